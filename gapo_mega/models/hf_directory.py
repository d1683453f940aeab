"""Hugging Face directories: finding them, and reading their tensors one at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError

import torch
from safetensors import safe_open
from torch import Tensor
from transformers import AutoConfig, PreTrainedConfig

from gapo_mega.models.safetensors_stream import DTYPES

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED_SINGLE = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLED = ".bin"
# Frequencies that old checkpoints stored; they follow from the configuration.
_DERIVED_TENSOR = ".rotary_emb.inv_freq"
_LAYER = re.compile(r"\.layers\.(\d+)\.")
_WEIGHT_SUFFIXES = (
    (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".distcp")
)  # fmt: skip


def is_companion(file: Path) -> bool:
    """Whether a file of a model directory is one that belongs beside the weights, such as the tokenizer."""
    return file.is_file() and not file.name.startswith(".") and not file.name.endswith(_WEIGHT_SUFFIXES)


class HFDirectory:
    """A model directory opened for reading: its configuration, and its tensors one at a time.

    Args:
        path: a local directory with ``config.json`` and weights: safetensors, single or sharded, else
            ``pytorch_model.bin`` likewise, of which nothing but tensors is unpickled.

    Raises:
        ValueError: the directory lacks one of these, or its index names a missing file.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._file_of = self._locate()
        self._likes: dict[str, Tensor] = {}

    def _locate(self) -> dict[str, Path]:
        for index, single in ((INDEX, SINGLE), (_PICKLED_INDEX, _PICKLED_SINGLE)):
            if (self.path / index).is_file():
                return self._read_index(self.path / index)
            if (self.path / single).is_file():
                return dict.fromkeys(_names(self.path / single), self.path / single)
        raise ValueError(
            f"model.path: {self.path} has neither {SINGLE} nor {INDEX} (nor {_PICKLED_SINGLE}); accepted: "
            "a directory with weights"
        )

    def _read_index(self, index: Path) -> dict[str, Path]:
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: self.path / file for name, file in weight_map.items()}
        missing = sorted({file.name for file in files.values() if not file.is_file()})
        if missing:
            raise ValueError(f"model.path: {index} names {missing}, which {self.path} does not hold")
        return files

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    def check_names(
        self, expected: frozenset[str], beside: Collection[str] = (), layers: int | None = None
    ) -> None:
        """Raise ``ValueError`` unless every expected tensor is there and every tensor is expected.

        ``beside``: names of others that may be there. ``layers``: those of later layers are left out.
        """
        missing = sorted(expected - self.names)
        if missing:
            raise ValueError(f"{self.path}: tensors missing: {_some(missing)}")
        left_out = {name for name in self.names if layers is not None and _layer_of(name) >= layers}
        unused = sorted(self.names - expected - left_out - set(beside))
        unused = [name for name in unused if not name.endswith(_DERIVED_TENSOR)]
        if unused:
            raise ValueError(f"{self.path}: tensors that this model does not have: {_some(unused)}")

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the type it is stored in. ``KeyError`` when there is none."""
        file = self._file_of[name]
        if file.suffix == _PICKLED:
            return _tensors_in(file)[name]
        # Opening maps the file and reads its header only, so nothing is kept open between tensors.
        with safe_open(file, framework="pt") as opened:
            tensor: Tensor = opened.get_tensor(name)
        return tensor

    def like(self, name: str) -> Tensor:
        """A tensor without data (on the meta device) of the shape and type of ``name``."""
        if name not in self._likes:
            self._likes[name] = self._read_like(name)
        return self._likes[name]

    def _read_like(self, name: str) -> Tensor:
        file = self._file_of[name]
        if file.suffix == _PICKLED:
            return _tensors_in(file)[name].to("meta")
        with safe_open(file, framework="pt") as opened:
            part = opened.get_slice(name)
            return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def read_config(directory: Path) -> PreTrainedConfig:
    """The configuration of a model directory. ``ValueError`` where there is none."""
    if not (directory / "config.json").is_file():
        raise ValueError(f"model.path: {directory} has no config.json; accepted: a Hugging Face directory")
    config: PreTrainedConfig = AutoConfig.from_pretrained(directory)
    return config


def _names(file: Path) -> list[str]:
    if file.suffix == _PICKLED:
        return list(_tensors_in(file))
    with safe_open(file, framework="pt") as opened:
        return list(opened.keys())


def _layer_of(name: str) -> int:
    """Number of the decoder layer that a tensor belongs to, -1 for others."""
    number = _LAYER.search(name)
    return int(number.group(1)) if number else -1


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped into memory; anything else in it is refused."""
    return _unpickled(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # neighbouring tensors are in one file
def _unpickled(file: Path, _written: int) -> dict[str, Tensor]:
    try:
        content = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UnpicklingError as error:
        raise ValueError(
            f"model.path: {file} holds more than tensors, which is not unpickled; accepted: weights only"
        ) from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"model.path: {file} is not a table of tensors; accepted: a saved state_dict")
    return content
