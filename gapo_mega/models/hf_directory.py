"""Hugging Face directories: finding, reading lazily, and writing them whole or not at all."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
# Everything a model needs beside its weights. Pickled weights are never fetched nor read.
_COMPANIONS = (
    "config.json",
    "generation_config.json",
    "tokenizer.json",
    "tokenizer.model",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "chat_template.json",
)
_DTYPE_NAMES = {torch.float32: "float32", torch.bfloat16: "bfloat16", torch.float16: "float16"}


class HFDirectory:
    """A model directory opened for reading: its configuration, and its tensors one at a time.

    Args:
        path: a local directory with ``config.json`` and safetensors weights (single or sharded).

    Raises:
        ValueError: the directory lacks one of these, or its index names a missing file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        if not (self.path / "config.json").is_file():
            raise ValueError(
                f"model.path: {self.path} has no config.json; accepted: a Hugging Face directory"
            )
        self.config: PreTrainedConfig = AutoConfig.from_pretrained(self.path)
        self._file_of = self._locate()

    def _locate(self) -> dict[str, Path]:
        index = self.path / _INDEX
        if index.is_file():
            weight_map = json.loads(index.read_text())["weight_map"]
            files = {name: self.path / file for name, file in weight_map.items()}
            missing = sorted({file.name for file in files.values() if not file.is_file()})
            if missing:
                raise ValueError(f"model.path: {index} names {missing}, which {self.path} does not hold")
            return files
        single = self.path / _SINGLE
        if not single.is_file():
            raise ValueError(
                f"model.path: {self.path} has neither {_SINGLE} nor {_INDEX}; accepted: safetensors weights"
            )
        with safe_open(single, framework="pt") as file:
            return dict.fromkeys(file.keys(), single)

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the type it is stored in. ``KeyError`` when there is none."""
        # Opening maps the file and reads its header only, so nothing is kept open between tensors.
        with safe_open(self._file_of[name], framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
        return tensor


def resolve(name_or_path: str | Path) -> Path:
    """The local directory of a model: ``name_or_path`` itself, or a download of that hub repository.

    Raises:
        ValueError: it is neither a directory nor a repository that can be reached.
    """
    path = Path(name_or_path).expanduser()
    if path.is_dir():
        return path
    # Imported here: only models named by repository need the network client.
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError

    try:
        patterns = [*_COMPANIONS, "*.safetensors", _INDEX]
        return Path(snapshot_download(str(name_or_path), allow_patterns=patterns))
    except (HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OSError) as error:
        raise ValueError(
            f"model.path: found {str(name_or_path)!r}, which is neither a local directory (looked at "
            f"{path.absolute()}) nor a Hugging Face repository, cached or within reach: {error}"
        ) from error


def write_hf(
    directory: str | Path,
    companions: str | Path,
    tensors: Iterable[tuple[str, Tensor]],
    *,
    overwrite: bool = False,
    shard_bytes: int = 4 << 30,
) -> None:
    """Write a model directory; it appears under its name only once it is complete.

    Args:
        directory: what to create.
        companions: directory whose configuration, tokenizer and chat template are copied; ``dtype``
            in ``config.json`` follows the tensors.
        tensors: names and tensors of one floating type, consumed one at a time.
        overwrite: replace ``directory`` where it exists already.
        shard_bytes: size at which a new safetensors file is begun; no more than this is held.

    Raises:
        ValueError: ``directory`` exists and ``overwrite`` is false, or the tensors have several types.
    """
    with _complete_or_absent(Path(directory), overwrite) as partial:
        for name in _COMPANIONS:
            if (Path(companions) / name).is_file():
                shutil.copyfile(Path(companions) / name, partial / name)
        dtype = _write_shards(partial, tensors, shard_bytes)
        _set_dtype(partial / "config.json", dtype)


@contextmanager
def _complete_or_absent(target: Path, overwrite: bool) -> Iterator[Path]:
    """A temporary sibling of ``target`` that takes its name when the block ends without an error."""
    if target.exists() and not overwrite:
        raise ValueError(f"{target} exists already; name a directory that does not")
    target.parent.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(prefix=f".{target.name}.partial-", dir=target.parent))
    partial.chmod(0o755)  # mkdtemp makes it private
    try:
        yield partial
        if target.exists():
            shutil.rmtree(target)
        partial.rename(target)
    finally:
        if partial.exists():
            shutil.rmtree(partial)


def _write_shards(directory: Path, tensors: Iterable[tuple[str, Tensor]], shard_bytes: int) -> torch.dtype:
    """Safetensors files, and their index when there are several. Returns the tensors' type."""
    shards: list[list[str]] = []
    pending: dict[str, Tensor] = {}
    pending_bytes = total_bytes = 0
    dtypes: set[torch.dtype] = set()

    def flush() -> None:
        save_file(pending, directory / f"shard-{len(shards)}", metadata={"format": "pt"})
        shards.append(list(pending))
        pending.clear()

    for name, tensor in tensors:
        size = tensor.numel() * tensor.element_size()
        if pending and pending_bytes + size > shard_bytes:
            flush()
            pending_bytes = 0
        pending[name] = tensor.detach().cpu().contiguous()
        pending_bytes += size
        total_bytes += size
        dtypes.add(tensor.dtype)
    if pending:
        flush()
    if len(dtypes) != 1:
        raise ValueError(f"tensors: found types {sorted(map(str, dtypes))}, accepted: one floating type")
    _name_shards(directory, shards, total_bytes)
    return dtypes.pop()


def _name_shards(directory: Path, shards: list[list[str]], total_bytes: int) -> None:
    """Their number is part of the file names, so it has to be known first."""
    if len(shards) == 1:
        (directory / "shard-0").rename(directory / _SINGLE)
        return
    weight_map: dict[str, str] = {}
    for number, names in enumerate(shards):
        file = f"model-{number + 1:05d}-of-{len(shards):05d}.safetensors"
        (directory / f"shard-{number}").rename(directory / file)
        weight_map.update(dict.fromkeys(names, file))
    index = {"metadata": {"total_size": total_bytes}, "weight_map": weight_map}
    (directory / _INDEX).write_text(json.dumps(index, indent=2) + "\n")


def _set_dtype(config_file: Path, dtype: torch.dtype) -> None:
    config = json.loads(config_file.read_text())
    config.pop("torch_dtype", None)  # the name before transformers 5
    config["dtype"] = _DTYPE_NAMES[dtype]
    config_file.write_text(json.dumps(config, indent=2) + "\n")
