"""What a GGUF file says about itself: typed metadata, and errors that name the key.

GGUF is llama.cpp's container: tensors, most of them quantised, behind a table of keys and values.
"""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

import gguf
import numpy as np

_T = TypeVar("_T")


class GGUFFile:
    """The metadata and the (memory-mapped) tensors of a GGUF file.

    Attributes:
        path: the file.
        tensors: what the file holds, by llama.cpp's name; each has ``data``, ``tensor_type`` and ``shape``,
            which counts from the innermost dimension.

    Raises:
        ValueError: the file does not exist, is cut short, is no GGUF file or one part of several.
    """

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"GGUF file: {path} does not exist")
        self.path = path
        try:
            self._reader = gguf.GGUFReader(path)
        except (ValueError, IndexError, KeyError) as error:
            raise ValueError(f"GGUF file {path} cannot be read ({error}); accepted: a whole file") from error
        self.tensors: dict[str, gguf.ReaderTensor] = {tensor.name: tensor for tensor in self._reader.tensors}
        self.require("split.count", None, 0, 1)

    def names(self) -> list[str]:
        """Every key of the metadata."""
        return [key for key in self._reader.fields if not key.startswith("GGUF.")]

    def get(self, key: str) -> object:
        """The value of ``key``, or ``None``."""
        field = self._reader.get_field(key)
        try:
            return None if field is None else field.contents()
        except UnicodeDecodeError as error:
            raise self.error(key, f"not text ({error.reason})", "UTF-8") from error

    def integer(self, key: str) -> int:
        """The integer under ``key``; ``ValueError`` where there is none."""
        value = self.optional_integer(key)
        if value is None:
            raise self.error(key, None, "an integer")
        return value

    def optional_integer(self, key: str) -> int | None:
        """The integer under ``key``, ``None`` where the key is absent."""
        value = self.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            raise self.error(key, value, "an integer")
        return value

    def number(self, key: str, default: float | None = None) -> float:
        """The floating-point number under ``key``; ``default`` where the key is absent."""
        value = self.get(key)
        if value is None and default is not None:
            return default
        if not isinstance(value, float):
            raise self.error(key, value, "a number")
        return float(str(np.float32(value)))  # stored in fp32: 1e-5 comes back as 9.9999997e-06

    def flag(self, key: str, default: bool) -> bool:
        """The truth value under ``key``; ``default`` where the key is absent."""
        value = self.get(key)
        if value is None:
            return default
        if not isinstance(value, bool):
            raise self.error(key, value, "true or false")
        return value

    def text(self, key: str) -> str | None:
        """The string under ``key``, ``None`` where the key is absent."""
        value = self.get(key)
        if value is not None and not isinstance(value, str):
            raise self.error(key, value, "a string")
        return value

    def strings(self, key: str) -> list[str]:
        """The list of strings under ``key``; ``ValueError`` where there is none."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(key, shortened(value), "a list of strings")
        return value

    def integers(self, key: str, length: int) -> list[int]:
        """The list of ``length`` integers under ``key``."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, int) for item in value):
            raise self.error(key, shortened(value), f"a list of {length} integers")
        return self._of_length(key, value, length)

    def numbers(self, key: str, length: int) -> list[float]:
        """The list of ``length`` floating-point numbers under ``key``."""
        value = self.get(key)
        if not isinstance(value, list) or not all(isinstance(item, float) for item in value):
            raise self.error(key, shortened(value), f"a list of {length} numbers")
        return self._of_length(key, value, length)

    def _of_length(self, key: str, values: list[_T], length: int) -> list[_T]:
        if len(values) != length:
            raise self.error(key, f"a list of {len(values)}", f"{length}, one a token")
        return values

    def require(self, key: str, *accepted: object) -> None:
        """``ValueError`` unless the value of ``key`` (``None``: absent) is one of ``accepted``."""
        value = self.get(key)
        if value not in accepted:
            raise self.error(key, shortened(value), list(accepted))

    def error(self, key: str, found: object, accepted: object) -> ValueError:
        """The error for a value that is not accepted; it shows ``found`` as Python writes it."""
        return ValueError(f"GGUF file {self.path}: {key} is {found!r}, accepted: {accepted}")


def shortened(value: object) -> object:
    """Cut a long list, which can be a vocabulary: its beginning tells enough."""
    return [*value[:3], "..."] if isinstance(value, list) and len(value) > 3 else value
