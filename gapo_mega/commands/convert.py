"""``gapo-mega convert``: finds out what the source is, and converts it."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Literal

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import DTYPES
from gapo_mega.files import local
from gapo_mega.runs.processes import is_main_rank, world_size

Kind = Literal["hf", "megatron", "gguf"]
_TARGETS = ("hf", "megatron")


def convert(
    source: Annotated[
        Path,
        typer.Option(
            "--from",
            parser=local,
            metavar="PATH",
            help="Hugging Face directory or hub name, Megatron checkpoint, or .gguf file.",
        ),
    ],
    target: Annotated[
        Path, typer.Option("--to", parser=local, metavar="PATH", help="The directory to write.")
    ],
    tp: Annotated[
        int, typer.Option("--tp", min=1, help="Tensor-parallel size whose parts are stored apart.")
    ] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Pipeline size whose stages share the writing.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. [as in the source]")] = None,
    to: Annotated[
        str | None, typer.Option("--format", help="hf or megatron. [the one that --from is not]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory that exists.")] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Write a checkpoint with this many local processes.")
    ] = None,
) -> None:
    """Convert a model: Hugging Face to Megatron, Megatron to Hugging Face, GGUF to either.

    Any layout can load a Megatron checkpoint, whatever --tp and --pp it was written with.
    """
    conversion = Conversion(str(source), target, tp, pp, dtype, to, overwrite)
    conversion.check()
    if nproc is not None:
        conversion.check_processes(nproc)
        launch.refuse_under_torchrun(nproc)
        launch.start(nproc, ["convert", *conversion.arguments()])
    launch.quiet_other_ranks()
    conversion.run()
    if is_main_rank():
        print(f"wrote {target}")


@dataclass(frozen=True)
class Conversion:
    """One requested conversion; the fields are the command's options."""

    source: str
    target: Path
    tensor: int = 1
    pipeline: int = 1
    dtype: str | None = None
    target_kind: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise ``ValueError`` for what can be refused without reading weights."""
        from gapo_mega.models.checkpoint_files import check_sizes
        from gapo_mega.models.huggingface.writing import refuse_inside

        check_sizes(local(self.source), "--from")
        kind = self._source_kind()
        for option, found, accepted in (
            ("--dtype", self.dtype, tuple(DTYPES)),
            ("--format", self.target_kind, _TARGETS),
        ):
            if found is not None and found not in accepted:
                raise ValueError(f"{option}: found {found!r}, accepted: {', '.join(accepted)}")
        target = self._target_kind(kind)
        if kind == target:
            raise ValueError(f"--format: found {target}, but {self.source} is that already")
        if target == "hf":
            for option, value in (("--tp", self.tensor), ("--pp", self.pipeline)):
                if value != 1:
                    raise ValueError(
                        f"{option}: found {value}, accepted: 1 (a Hugging Face directory has no layout)"
                    )
        if kind == "gguf" and self.dtype is not None and target == "hf":
            raise ValueError(f"--dtype: found {self.dtype} for a .gguf file, which becomes fp32")
        refuse_inside(local(self.source), self.target)
        if self.target.exists() and not self.overwrite:
            raise ValueError(f"--to: {self.target} exists already; name another directory, or --overwrite")
        if kind == "hf" and local(self.source).is_dir():
            self._check_model(local(self.source))

    def _check_model(self, source: Path) -> None:
        """Check the model's family and the layout before any process starts."""
        from gapo_mega.models import shape_of
        from gapo_mega.models.huggingface.config import read_config

        shape = shape_of(read_config(source, "--from"))
        for option, value, divided in (
            ("--tp", self.tensor, {"key-value heads": shape.kv_groups, "MLP width": shape.ffn}),
            ("--pp", self.pipeline, {"layers": shape.num_layers}),
        ):
            for what, size in divided.items():
                if size % value:
                    raise ValueError(
                        f"{option}: found {value}, accepted: a divisor of the model's {size} {what}"
                    )

    def check_processes(self, count: int) -> None:
        """Raise ``ValueError`` unless ``count`` processes can share this conversion."""
        kind = self._source_kind()
        if count > 1 and (kind != "hf" or self._target_kind(kind) != "megatron"):
            raise ValueError(
                f"--nproc: found {count} processes, accepted: 1 (only a conversion from a Hugging Face "
                "directory to Megatron is shared)"
            )

    def run(self) -> None:
        """Convert. Within torchrun all processes share the writing of a Megatron checkpoint."""
        import torch
        import torch.distributed as dist

        from gapo_mega.engine.base import checkpoint_converter, start_process_group
        from gapo_mega.models.gguf.importing import import_gguf
        from gapo_mega.models.huggingface.location import resolve
        from gapo_mega.scratch import remove_left, scratch

        kind = self._source_kind()
        target = self._target_kind(kind)
        self.check_processes(world_size())
        if kind == "gguf" and target == "hf":
            import_gguf(self.source, self.target, overwrite=self.overwrite)
            return
        converter = checkpoint_converter()
        dtype: torch.dtype | None = None if self.dtype is None else getattr(torch, DTYPES[self.dtype])
        if target == "hf":
            converter.to_hf(local(self.source), self.target, dtype=dtype, overwrite=self.overwrite)
            return
        if world_size() > 1:
            start_process_group("gloo")
        parent, prefix = self._made_parent(), f".{self.target.name}.source-"
        if is_main_rank():
            remove_left(parent, prefix)
        with scratch(parent, prefix) as (folder, _):
            source = resolve(self.source) if kind == "hf" else folder / "hf"
            if kind == "gguf":
                import_gguf(self.source, source)
            converter.to_checkpoint(
                source,
                self.target,
                tensor=self.tensor,
                pipeline=self.pipeline,
                dtype=dtype,
                overwrite=self.overwrite,
            )
        if dist.is_initialized():
            dist.destroy_process_group()

    def arguments(self) -> list[str]:
        """The command line of this conversion, for other processes."""
        options = [f"--from={self.source}", f"--to={self.target}", f"--tp={self.tensor}"]
        options += [f"--pp={self.pipeline}"]
        options += [f"--dtype={self.dtype}"] if self.dtype else []
        options += [f"--format={self.target_kind}"] if self.target_kind else []
        return options + (["--overwrite"] if self.overwrite else [])

    def _source_kind(self) -> Kind:
        from gapo_mega.models.huggingface.location import is_megatron_checkpoint

        path = local(self.source)
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ValueError(f"--from: file {path} not found")
            return "gguf"
        if path.is_file():
            raise ValueError(
                f"--from: found the file {path}, accepted: a directory, a hub name or a .gguf file"
            )
        if is_megatron_checkpoint(path):
            return "megatron"
        if path.is_absolute() and not path.is_dir():
            raise ValueError(f"--from: {path} not found; accepted: a directory, a hub name or a .gguf file")
        return "hf"

    def _target_kind(self, source: Kind) -> str:
        layout = self.tensor > 1 or self.pipeline > 1  # which a Hugging Face directory does not have
        return self.target_kind or ("megatron" if source == "hf" or (source == "gguf" and layout) else "hf")

    def _made_parent(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--to: {self.target} cannot be written: {error}") from error
        return self.target.parent
