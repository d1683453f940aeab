"""Hugging Face directories: finding them, and reading their tensors one at a time."""

from __future__ import annotations

import json
import logging
import zipfile
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager
from functools import lru_cache
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from gapo_mega.models.casting import WEIGHT_DTYPES, dtype_name
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.links import require_inside
from gapo_mega.models.huggingface.safetensors_stream import DTYPES

logger = logging.getLogger(__name__)

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
_PICKLED_SINGLE = "pytorch_model.bin"
_PICKLED_INDEX = "pytorch_model.bin.index.json"
_PICKLED = ".bin"
# Frequencies that old checkpoints stored; they follow from the configuration.
_DERIVED_TENSOR = ".rotary_emb.inv_freq"
_WEIGHT_SUFFIXES = (
    (".safetensors", ".bin", ".pt", ".pth", ".gguf", ".h5", ".msgpack", ".onnx", ".index.json", ".distcp")
)  # fmt: skip


_TEMPLATES = "additional_chat_templates"  # folder of the chat templates that have names


def companions_in(directory: Path) -> Iterator[Path]:
    """The files that belong beside the weights, such as the tokenizer; paths below ``directory``.

    Raises ``ValueError`` for one that a link leads out of the directory.
    """
    for file in [*directory.iterdir(), *(directory / _TEMPLATES).glob("*.jinja")]:
        hidden = file.name.startswith(".")
        if file.is_file() and not hidden and not file.name.endswith(_WEIGHT_SUFFIXES):
            require_inside(file, directory)
            yield file.relative_to(directory)


class HFDirectory:
    """A model directory opened for reading: its configuration, and its tensors one at a time.

    Args:
        path: a local directory with ``config.json`` and weights: safetensors, single or sharded, else
            ``pytorch_model.bin`` likewise, from which only tensors are unpickled.

    Raises:
        ValueError: the directory lacks one of these, has an adapter beside them, or its index and its files
            do not agree.
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self.config = read_config(self.path)
        self._file_of = self._locate()
        self._likes: dict[str, Tensor] = {}

    def _locate(self) -> dict[str, Path]:
        """The file of every tensor. The order of the files is that of transformers' ``from_pretrained``."""
        for index, single in ((INDEX, SINGLE), (_PICKLED_INDEX, _PICKLED_SINGLE)):
            if (self.path / single).is_file():
                if (self.path / index).is_file():
                    _listed(self.path / index)  # a broken one is refused all the same
                    logger.warning(
                        "%s: reads %s, as transformers does; %s is not used", self.path, single, index
                    )
                return dict.fromkeys(_names(self.path / single), self.path / single)
            if (self.path / index).is_file():
                return self._read_index(self.path / index)
        raise ValueError(
            f"model.path: {self.path} has neither {SINGLE} nor {INDEX} (nor {_PICKLED_SINGLE}); accepted: "
            "a directory with weights"
        )

    def _read_index(self, index: Path) -> dict[str, Path]:
        """What the files hold that the index names: transformers reads all of these, listed or not."""
        listed = _listed(index)
        files = sorted(set(listed.values()))
        missing = [file for file in files if not (self.path / file).is_file()]
        if missing:
            raise ValueError(f"model.path: {index} names {missing}, which {self.path} does not hold")
        for file in files:
            require_inside(self.path / file, self.path)
        held: dict[str, Path] = {}
        for file in files:
            for name in _names(self.path / file):
                if name in held:
                    raise ValueError(
                        f"model.path: {name} is in {held[name].name} and in {file} of {self.path}; accepted: "
                        "every tensor once"
                    )
                held[name] = self.path / file
        lacking = sorted(listed.keys() - held.keys())
        if lacking:
            raise ValueError(f"model.path: {index} names {_some(lacking)}, which none of its files holds")
        return held

    @property
    def names(self) -> frozenset[str]:
        """Names of all tensors."""
        return frozenset(self._file_of)

    @property
    def weights(self) -> list[str]:
        """Names of the tensors that do not follow from the configuration, file by file as they are stored."""
        return [name for name in self._file_of if not name.endswith(_DERIVED_TENSOR)]

    def check_names(
        self,
        expected: frozenset[str],
        beside: Collection[str] = (),
        copies: Mapping[str, str] | None = None,
        left_out: Collection[str] = (),
    ) -> None:
        """Raise ``ValueError`` unless every expected tensor is there, unquantised, and all others expected.

        Args:
            expected: names of the tensors that are used.
            beside: names of others that may be there.
            copies: others that may be there if they equal the tensor named, bit by bit.
            left_out: names of tensors of the model that are not wanted.
        """
        missing = sorted(expected - self.names)
        if missing:
            raise ValueError(f"{self.path}: tensors missing: {_some(missing)}")
        unused = sorted(self.names - expected - set(left_out) - set(beside))
        unused = [name for name in unused if not name.endswith(_DERIVED_TENSOR)]
        for name, original in (copies or {}).items():
            if name in unused:
                self._require_equal(name, original)
                unused.remove(name)
        if unused:
            raise ValueError(f"{self.path}: tensors that this model does not have: {_some(unused)}")
        for name in sorted(expected):
            if self.like(name).dtype not in WEIGHT_DTYPES:
                raise self._quantised(name, dtype_name(self.like(name).dtype))

    def _quantised(self, name: str, stored: str) -> ValueError:
        return ValueError(
            f"{self.path}: {name} is stored as {stored}, accepted: "
            f"{', '.join(map(dtype_name, WEIGHT_DTYPES))} (weights that are not quantised)"
        )

    def _require_equal(self, name: str, original: str) -> None:
        """Raise ``ValueError`` for a copy that differs, which would be lost silently."""
        copy, kept = self.read(name), self.read(original)
        common = torch.promote_types(copy.dtype, kept.dtype)
        if not torch.equal(copy.to(common), kept.to(common)):
            raise ValueError(
                f"{self.path}: {name} differs from {original}, but config.json ties them "
                "(tie_word_embeddings true); accepted: equal tensors, or tie_word_embeddings false"
            )

    def read(self, name: str) -> Tensor:
        """One tensor, on the CPU, in the type it is stored in. ``KeyError`` when there is none."""
        file = self._file_of[name]
        if file.suffix == _PICKLED:
            return _tensors_in(file)[name]
        # Opening maps the file and reads its header only, so nothing is kept open between tensors.
        with _opened(file) as opened:
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
        with _opened(file) as opened:
            part = opened.get_slice(name)
            if part.get_dtype() not in DTYPES:
                raise self._quantised(name, part.get_dtype())
            return torch.empty(part.get_shape(), dtype=DTYPES[part.get_dtype()], device="meta")


def _listed(index: Path) -> dict[str, str]:
    """The file of every tensor, as the index has it."""
    try:
        return {str(name): str(file) for name, file in json.loads(index.read_text())["weight_map"].items()}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"model.path: {index} is no index of weights ({error!r})") from error


def _names(file: Path) -> list[str]:
    if file.suffix == _PICKLED:
        return list(_tensors_in(file))
    with _opened(file) as opened:
        return list(opened.keys())


@contextmanager
def _opened(file: Path) -> Iterator[Any]:
    try:
        with safe_open(file, framework="pt") as opened:
            yield opened
    except SafetensorError as error:
        raise ValueError(
            f"model.path: {file} cannot be read ({error}); accepted: a whole safetensors file, no pointer of "
            "Git LFS to one"
        ) from error


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def _tensors_in(file: Path) -> dict[str, Tensor]:
    """The tensors of a pickled file, mapped into memory; anything else in it is refused."""
    return _unpickled(file, file.stat().st_mtime_ns)


@lru_cache(maxsize=1)  # neighbouring tensors are in one file
def _unpickled(file: Path, _written: int) -> dict[str, Tensor]:
    try:
        content = _loaded(file)
    except UnpicklingError as error:
        raise ValueError(
            f"model.path: {file} holds more than tensors, which is not unpickled; accepted: weights only"
        ) from error
    except (RuntimeError, EOFError, OSError, KeyError) as error:
        raise ValueError(f"model.path: {file} cannot be read ({error}); accepted: a whole file") from error
    if not isinstance(content, dict) or not all(isinstance(v, Tensor) for v in content.values()):
        raise ValueError(f"model.path: {file} is not a table of tensors; accepted: a saved state_dict")
    return content


def _loaded(file: Path) -> Any:
    """The file's content, mapped into memory unless it has the format of PyTorch before 1.6."""
    mapped = zipfile.is_zipfile(file)
    return torch.load(file, map_location="cpu", weights_only=True, mmap=mapped)
