"""Rows of data: read from anywhere, split by name, columns checked."""

from __future__ import annotations

import logging
import os
import re
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

from gapo_mega.data.json_rows import Row, json_rows
from gapo_mega.data.named import NamedSplit, is_hub_name, read_named
from gapo_mega.files import local
from gapo_mega.option_checks import shown_name

logger = logging.getLogger(__name__)

PACKAGE_PREFIX = "package:"
FILE_TYPES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
SPLIT_COLUMN = "split"
_PART = re.compile(r"[\[+]")  # in datasets' names of splits: train[:10%], train+test
_MOST_NAMES = 20  # of splits or columns in an error
_SHOWN = 5  # rows that the log names
_AT_ONCE = 1000  # rows of a parquet file that are turned into Python objects together

__all__ = [
    "PACKAGE_PREFIX",
    "SPLIT_COLUMN",
    "Row",
    "Source",
    "Table",
    "check_column",
    "read_named",
    "read_rows",
]


@dataclass(frozen=True)
class Source(NamedSplit):
    """One split of ``package:NAME``, a file of ``FILE_TYPES``, a hub name or a directory."""

    @property
    def is_on_the_hub(self) -> bool:
        """Whether only the hub, or its cache, can have it."""
        return self.file is None and is_hub_name(self.name)

    @property
    def file(self) -> Path | None:
        """The file that it names by the end of its name; none: a directory, a hub name or the package's."""
        return local(self.name) if self.name.endswith(FILE_TYPES) else None

    def __str__(self) -> str:
        subset = f", {self.subset_parameter} {self.subset!r}" if self.subset is not None else ""
        return f"{self.parameter} {self.name!r} ({self.split_parameter} {self.split!r}{subset})"


@dataclass(frozen=True)
class Table:
    """Rows of one split with their numbers, from 1: a JSON file's lines, else rows of the file or split."""

    source: Source
    columns: Sequence[str]
    rows: Sequence[Row]
    numbers: Sequence[int]

    def __len__(self) -> int:
        return len(self.rows)

    def __iter__(self) -> Iterator[tuple[int, Row]]:
        """Numbers and rows. Raises ``ValueError`` for a row that is no UTF-8; ``datasets`` decodes late."""
        numbers = iter(self.numbers)
        try:
            yield from zip(numbers, self.rows, strict=True)
        except UnicodeDecodeError as error:
            found = f"found the byte 0x{error.object[error.start]:02x}, accepted: UTF-8 text"
            raise ValueError(f"{self.place(self._after(numbers))}: {found}") from None

    def _after(self, rest: Iterator[int]) -> int:
        """The number that was taken last, where ``rest`` are those that were not."""
        return self.numbers[len(self.numbers) - sum(1 for _ in rest) - 1]

    def place(self, number: int) -> str:
        """What errors call a row."""
        return f"{self.source.parameter} {self.source.name!r}, row {number}"


def read_rows(source: Source, limit: int | None = None) -> Table:
    """The rows of ``source``, or the first ``limit`` of them.

    A file with a ``split`` column holds several splits, and that column names each row's; others are one.

    Raises ``ValueError`` for a source that is missing or not readable and for a split or subset that it does
    not have.
    """
    path = packaged(source.parameter, source.name) if source.name.startswith(PACKAGE_PREFIX) else source.file
    if path is None:
        columns, found = read_named(source, limit)
        return Table(source, columns, found, range(1, len(found) + 1))
    if source.subset is not None:
        raise ValueError(
            f"{source.subset_parameter}: found {source.subset!r} with the file {source.name!r}, accepted: "
            "null (a file has no subsets; its split column makes splits)"
        )
    return _file_rows(source, path, limit)


def packaged(parameter: str, name: str) -> Path:
    """The file behind ``package:NAME``; ``ValueError`` with the known names for another name."""
    folder = Path(str(resources.files("gapo_mega"))) / "demo"
    known = {PACKAGE_PREFIX + found.stem: found for found in folder.iterdir() if found.suffix == ".jsonl"}
    if name not in known:
        raise ValueError(f"{parameter}: found {name!r}, accepted: {', '.join(sorted(known))}")
    return known[name]


def check_column(column_key: str, column: str, table: Table) -> None:
    """``ValueError`` with the columns that there are, unless ``table`` has ``column``."""
    if column not in table.columns:
        raise ValueError(
            f"{column_key}: found {column!r}, accepted for {table.source.name!r}: "
            f"{listed_names(table.columns)}"
        )


def tell_unread(table: Table, read: Sequence[str]) -> None:
    """Say in the log which columns a command does not read."""
    unread = sorted({*table.columns} - {*read, SPLIT_COLUMN})
    if unread:
        logger.info("%s: columns that are not read: %s", table.source, listed_names(unread))


def _file_rows(source: Source, path: Path, limit: int | None) -> Table:
    """Rows of a file of ``FILE_TYPES``; ``ValueError`` if it is missing, empty or broken."""
    named = f"{source.parameter}: file {str(path)!r}"
    # os.path: to pathlib, a name that no file system takes is no answer but an OSError.
    if os.path.isdir(path):
        raise ValueError(f"{named} is a directory, accepted: a file of that name")
    if not os.path.isfile(path):
        raise ValueError(f"{named} not found")
    if path.stat().st_size == 0:
        raise ValueError(f"{named} is empty")
    numbered = _parquet_rows(path) if path.suffix == ".parquet" else json_rows(path)
    try:
        table = _split(source, numbered, limit)
    except _NoSuchSplit as error:
        raise ValueError(str(error)) from None
    except (ValueError, OSError, EOFError, OverflowError, zlib.error) as error:
        kind = next(end for end in sorted(FILE_TYPES, key=len, reverse=True) if path.name.endswith(end))
        reason = " ".join(str(error).split())
        raise ValueError(f"{named} not readable as {kind}: {reason}") from None
    if not table.rows:
        raise ValueError(f"{named} has no rows")
    return table


class _NoSuchSplit(Exception):
    """The file's marks do not have the split that was asked for."""


def _split(source: Source, numbered: Iterator[tuple[int, Row]], limit: int | None) -> Table:
    columns: dict[str, None] = {}
    rows: list[Row] = []
    numbers: list[int] = []
    marks: set[str] = set()
    unmarked: list[int] = []
    for number, row in numbered:
        if SPLIT_COLUMN in row and SPLIT_COLUMN not in columns:  # the rows before it have no mark
            rows.clear()
            numbers.clear()
        columns |= dict.fromkeys(row)
        marks.add(str(row.get(SPLIT_COLUMN)))
        if row.get(SPLIT_COLUMN) is None:
            unmarked.append(number)
        if SPLIT_COLUMN not in columns or row.get(SPLIT_COLUMN) == source.split:
            rows.append(row)
            numbers.append(number)
        if limit is not None and len(rows) >= limit:
            break
    if marks and not rows:
        raise _NoSuchSplit(
            f"{source.split_parameter}: found {source.split!r}, accepted for {source.name!r}: "
            f"{listed_names(marks)}"
        )
    if SPLIT_COLUMN not in columns and _PART.search(source.split):
        raise _NoSuchSplit(
            f"{source.split_parameter}: found {source.split!r}, accepted for the file {source.name!r}: a "
            "name (a file has no parts of a split)"
        )
    if SPLIT_COLUMN in columns and unmarked:
        logger.warning(
            "%s: left out %d rows without a value of %r, which others have: rows %s",
            source, len(unmarked), SPLIT_COLUMN, ", ".join(map(str, unmarked[:_SHOWN])),
        )  # fmt: skip
    return Table(source, list(columns), rows, numbers)


def listed_names(names: Iterable[str]) -> str:
    """Names of columns and splits, which may be anything, on one line; not all of very many."""
    ordered = sorted(names)
    more = f" and {len(ordered) - _MOST_NAMES} more" if len(ordered) > _MOST_NAMES else ""
    return ", ".join(map(shown_name, ordered[:_MOST_NAMES])) + more


def _parquet_rows(path: Path) -> Iterator[tuple[int, Row]]:
    import pyarrow.parquet as parquet

    # Opened here: given a name, pyarrow may take it for an address.
    with path.open("rb") as stream, parquet.ParquetFile(stream) as file:
        names: list[str] = file.schema_arrow.names
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"the column {twice[0]!r} is there twice")
        done = 0
        for batch in file.iter_batches(batch_size=_AT_ONCE):
            try:
                rows = batch.to_pylist()
            except (UnicodeDecodeError, OverflowError):
                raise _unreadable_cell(batch, done) from None
            yield from enumerate(rows, start=done + 1)
            done += len(rows)


def _unreadable_cell(batch: Any, before: int) -> ValueError:
    """An error that names the first cell of a ``pyarrow.RecordBatch`` that Python cannot hold."""
    for row in range(batch.num_rows):
        for name in batch.schema.names:
            try:
                batch.column(name)[row].as_py()
            except UnicodeDecodeError as error:
                found = f"the byte 0x{error.object[error.start]:02x}, accepted: UTF-8 text"
            except OverflowError as error:
                found = f"a value that Python cannot hold ({error})"
            else:
                continue
            return ValueError(f"row {before + row + 1}: key {name!r}: found {found}")
    raise AssertionError("some cell was not readable")
