"""Rows of JSON files, read strictly: what others change or drop without a word is an error with row and key.

``datasets`` infers one type per column (texts that look like dates become dates), keeps what it read for
another file of the same time stamp and size, and takes brackets in names for patterns.
"""

from __future__ import annotations

import codecs
import gzip
import json
import math
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import IO, Any

from gapo_mega.option_checks import shown

Row = Mapping[str, Any]

_DEEPEST = 100  # lists and objects within each other: what copies and writes a row again goes no deeper
_SPACE = re.compile(r"[ \t\n\r]*")
_SURROGATE = re.compile(r"[\ud800-\udfff]")
_ESCAPED_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")


def json_rows(path: Path) -> Iterator[tuple[int, Row]]:
    """Rows of a ``.jsonl[.gz]`` or ``.json[.gz]`` file with their numbers, from 1.

    A line is a row and its number, as an editor counts; empty lines are skipped. A ``.json`` file may hold
    one array instead, whose items are the rows. UTF-8, with or without a byte order mark.

    Raises ``ValueError``, beginning with the row, for what is no JSON object, a key given twice, a number
    that is not finite, and what is no UTF-8; ``OSError``, ``EOFError`` or ``zlib.error`` for a damaged file.
    """
    with _opened(path) as stream:
        if path.name.endswith((".json", ".json.gz")) and _first_byte(stream) == b"[":
            yield from _items(stream.read())
            return
        for number, line in enumerate(stream, start=1):
            if number == 1:
                line = line.removeprefix(codecs.BOM_UTF8)
            if line.strip():
                yield number, _row(_line(line, number), number)


def _opened(path: Path) -> IO[bytes]:
    return gzip.open(path, "rb") if path.suffix == ".gz" else path.open("rb")  # type: ignore[return-value]


def _first_byte(stream: IO[bytes]) -> bytes:
    """The first byte that is no white space; the stream is at its beginning again."""
    first = b" "
    start = stream.read(len(codecs.BOM_UTF8))
    if start != codecs.BOM_UTF8:
        stream.seek(0)
    while first and not first.strip():
        first = stream.read(1)
    stream.seek(0)
    return first


def _line(line: bytes, number: int) -> Any:
    try:
        text = line.decode("utf-8")
    except UnicodeDecodeError:
        text = line.decode("utf-8", "surrogateescape")  # whose surrogates tell the key below
    return _Strict(number).decode(text)


def _items(data: bytes) -> Iterator[tuple[int, Row]]:
    try:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8")
    except UnicodeDecodeError:
        text = data.removeprefix(codecs.BOM_UTF8).decode("utf-8", "surrogateescape")
    place = _after_space(text, _after_space(text, 0) + 1)
    number = 0
    comma = False
    while comma or text[place : place + 1] != "]":
        number += 1
        value, place = _Strict(number).decode_at(text, place)
        yield number, _row(value, number)
        place = _after_space(text, place)
        comma = text[place : place + 1] == ","
        if comma:
            place = _after_space(text, place + 1)
        elif text[place : place + 1] != "]":
            raise ValueError(f"row {number}: found no , or ] after it")
    if _after_space(text, place + 1) != len(text):
        raise ValueError(f"row {number}: found text after the array's end")


def _after_space(text: str, place: int) -> int:
    found = _SPACE.match(text, place)
    return found.end() if found else place


def _row(value: Any, number: int) -> Row:
    if not isinstance(value, dict):
        kind = {list: "an array", str: "a text", type(None): "null"}.get(type(value), "a number")
        raise ValueError(f"row {number}: found {kind}, accepted: an object with the columns as keys")
    return value


def _depth(value: Any) -> int:
    """How many lists and objects lie within each other; without recursion, for there may be many."""
    depth = 0
    level = [value]
    while level:
        depth += 1
        level = [
            inner
            for one in level
            for inner in (one.values() if isinstance(one, dict) else one)
            if isinstance(inner, dict | list)
        ]
    return depth


class _Strict:
    """Decodes one row; errors begin with its number."""

    def __init__(self, number: int) -> None:
        self._number = number
        self._suspect = False  # a number that is not finite was seen
        self._decoder = json.JSONDecoder(
            object_pairs_hook=self._object, parse_constant=self._constant, parse_float=self._float
        )

    def decode(self, text: str) -> Any:
        """The only value in ``text``."""
        value, end = self.decode_at(text, _after_space(text, 0))
        if _after_space(text, end) != len(text):
            raise ValueError(f"row {self._number}: found more after its end, in column {end + 1}")
        return value

    def decode_at(self, text: str, start: int) -> tuple[Any, int]:
        """The value that begins at ``start``, and where it ends."""
        try:
            value, end = self._decoder.raw_decode(text, start)
        except json.JSONDecodeError as error:
            raise ValueError(f"row {self._number}: {error.msg}, in column {error.colno}") from None
        except (ValueError, RecursionError) as error:
            reason = "too deep" if isinstance(error, RecursionError) else error
            raise ValueError(f"row {self._number}: {reason}") from None
        part = text[start:end]
        if part.count("[") + part.count("{") > _DEEPEST and _depth(value) > _DEEPEST:
            raise ValueError(f"row {self._number}: too deep, accepted: {_DEEPEST} lists and objects at most")
        if self._suspect or _SURROGATE.search(part) or _ESCAPED_SURROGATE.search(part):
            self._check(value, "")
        return value, end

    def _object(self, pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found: dict[str, Any] = {}
        for key, value in pairs:
            if key in found:
                raise ValueError(f"key {shown(key)} is given twice")
            found[key] = value
        return found

    def _constant(self, name: str) -> float:
        self._suspect = True
        return float(name)

    def _float(self, text: str) -> float:
        value = float(text)
        self._suspect = self._suspect or math.isinf(value)
        return value

    def _check(self, value: Any, key: str) -> None:
        """Raise ``ValueError``, with the key, for a number or a text that is none."""
        inner: list[tuple[str, Any]] = []
        if isinstance(value, dict):
            inner = [(f"{key}.{name}" if key else name, item) for name, item in value.items()]
            inner += [(key or "a key", name) for name in value]
        elif isinstance(value, list):
            inner = [(f"{key}[{i}]", item) for i, item in enumerate(value)]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError(
                f"row {self._number}: key {shown(key)}: found {value}, accepted: a finite number"
            )
        elif isinstance(value, str) and (found := _SURROGATE.search(value)):
            code = ord(found[0])
            byte = 0xDC80 <= code <= 0xDCFF  # as surrogateescape writes one that is no UTF-8
            what = f"the byte 0x{code - 0xDC00:02x}" if byte else f"\\u{code:04x} alone"
            raise ValueError(f"row {self._number}: key {shown(key)}: found {what}, accepted: UTF-8 text")
        for name, item in inner:
            self._check(item, name)
