"""``gapo-mega convert``: reads off what the source is, and has it converted."""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist

from gapo_mega.models import shape_of
from gapo_mega.models.gguf.importing import import_gguf
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.models.huggingface.config import read_config

Kind = Literal["hf", "megatron", "gguf"]
_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_TARGETS = ("hf", "megatron")


@dataclass(frozen=True)
class Conversion:
    """One conversion as it was asked for; the fields are the command's options."""

    source: str
    target: Path
    tensor: int = 1
    pipeline: int = 1
    dtype: str | None = None
    target_kind: str | None = None
    overwrite: bool = False

    def check(self) -> None:
        """Raise ``ValueError`` for what can be told without reading any weights."""
        kind = self._source_kind()
        for option, found, accepted in (
            ("--dtype", self.dtype, tuple(_DTYPES)),
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
        if self.target.exists() and not self.overwrite:
            raise ValueError(f"--to: {self.target} exists already; name another directory, or --overwrite")
        if kind == "hf" and Path(self.source).expanduser().is_dir():
            self._check_model(Path(self.source).expanduser())

    def _check_model(self, source: Path) -> None:
        """The family and the layout, before any process is started."""
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
        kind = self._source_kind()
        target = self._target_kind(kind)
        self.check_processes(int(os.environ.get("WORLD_SIZE", "1")))
        if kind == "gguf" and target == "hf":
            import_gguf(self.source, self.target, overwrite=self.overwrite)
            return
        # Imported late: Megatron takes seconds to load.
        from gapo_mega.engine.megatron.checkpoint import convert

        dtype = None if self.dtype is None else _DTYPES[self.dtype]
        if target == "hf":
            convert.to_hf(Path(self.source), self.target, dtype=dtype, overwrite=self.overwrite)
            return
        if "RANK" in os.environ:
            dist.init_process_group("gloo")
        with tempfile.TemporaryDirectory(dir=self._made_parent()) as scratch:
            source = model_location.resolve(self.source) if kind == "hf" else Path(scratch) / "hf"
            if kind == "gguf":
                import_gguf(self.source, source)
            convert.to_checkpoint(
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
        path = Path(self.source).expanduser()
        if path.suffix == ".gguf":
            if not path.is_file():
                raise ValueError(f"--from: file {path} not found")
            return "gguf"
        if path.is_file():
            raise ValueError(
                f"--from: found the file {path}, accepted: a directory, a hub name or a .gguf file"
            )
        if (path / "metadata.json").is_file() and not (path / "config.json").is_file():
            return "megatron"
        if path.is_absolute() and not path.is_dir():
            raise ValueError(f"--from: {path} not found; accepted: a directory, a hub name or a .gguf file")
        return "hf"

    def _target_kind(self, source: Kind) -> str:
        layout = self.tensor > 1 or self.pipeline > 1  # which a Hugging Face directory has not
        return self.target_kind or ("megatron" if source == "hf" or (source == "gguf" and layout) else "hf")

    def _made_parent(self) -> Path:
        try:
            self.target.parent.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ValueError(f"--to: {self.target} cannot be written: {error}") from error
        return self.target.parent
