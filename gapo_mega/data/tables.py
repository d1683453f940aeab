"""Rows of data: read from anywhere ``datasets`` reads, split by name, columns checked.

Arguments that end in ``_key`` are the names that errors call a parameter by, such as ``data.source``.
"""

from __future__ import annotations

import zlib
from importlib import resources
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset

PACKAGE_PREFIX = "package:"
FILE_TYPES = (".jsonl", ".json", ".parquet", ".jsonl.gz", ".json.gz")
SPLIT_COLUMN = "split"


def read_rows(source_key: str, source: str, split_key: str, split: str) -> Dataset:
    """One split of ``source``: ``package:NAME``, a file of ``FILE_TYPES``, a hub name or a directory.

    A file with a ``split`` column holds several splits, and that column names each row's; others are one.

    Raises ``ValueError`` for a source that is missing or not readable and for a split that it does not have.
    """
    if source.startswith(PACKAGE_PREFIX):
        table = read_file(source_key, packaged(source_key, source))
    elif source.endswith(FILE_TYPES):
        table = read_file(source_key, Path(source))
    else:
        return read_named(source_key, source, split_key, split)
    if SPLIT_COLUMN not in table.column_names:
        return table
    marks = table[SPLIT_COLUMN]
    rows = [i for i, mark in enumerate(marks) if mark == split]
    if not rows:
        raise ValueError(
            f"{split_key}: found {split!r}, accepted for {source!r}: "
            f"{', '.join(sorted(map(str, set(marks))))}"
        )
    return table.select(rows)


def packaged(source_key: str, source: str) -> Path:
    """The file behind ``package:NAME``; ``ValueError`` with the known names for another name."""
    folder = Path(str(resources.files("gapo_mega"))) / "demo"
    path = folder / f"{source.removeprefix(PACKAGE_PREFIX)}.jsonl"
    if not path.is_file():
        names = sorted(PACKAGE_PREFIX + found.stem for found in folder.glob("*.jsonl"))
        raise ValueError(f"{source_key}: found {source!r}, accepted: {', '.join(names)}")
    return path


def read_file(source_key: str, path: Path) -> Dataset:
    """All rows of a file of ``FILE_TYPES``; ``ValueError`` if it is missing, empty or broken."""
    from datasets import Dataset
    from datasets.exceptions import DatasetsError

    if not path.is_file():
        raise ValueError(f"{source_key}: file {str(path)!r} not found")
    if path.stat().st_size == 0:
        raise ValueError(f"{source_key}: file {str(path)!r} is empty")
    read = Dataset.from_parquet if path.suffix == ".parquet" else Dataset.from_json
    try:
        return read(str(path))
    except (DatasetsError, OSError, EOFError, zlib.error) as error:  # all but the first: a damaged .gz
        kind = next(end for end in sorted(FILE_TYPES, key=len, reverse=True) if path.name.endswith(end))
        reason = error.__cause__ or error
        raise ValueError(f"{source_key}: file {str(path)!r} not readable as {kind}: {reason}") from None


def read_named(source_key: str, source: str, split_key: str, split: str) -> Dataset:
    """A data set of the hub, or a local directory of one; ``ValueError`` in one line if there is none."""
    from datasets import load_dataset
    from datasets.exceptions import DatasetsError

    try:
        return load_dataset(source, split=split)
    except ConnectionError as error:
        raise ValueError(
            f"{source_key}: found {source!r}, but the Hugging Face hub cannot be reached ({error}); "
            f"accepted offline: a file ending in {', '.join(FILE_TYPES)}, {PACKAGE_PREFIX}NAME, or a data "
            "set that is already in the cache"
        ) from None
    except (DatasetsError, OSError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(
            f"{source_key}: found {source!r}, accepted: a hub name, a file ending in "
            f"{', '.join(FILE_TYPES)} or {PACKAGE_PREFIX}NAME ({reason})"
        ) from None
    except (
        ValueError
    ) as error:  # what datasets raises for an unknown split or subset; it lists the known ones
        raise ValueError(
            f"{split_key}: found {split!r} of {source!r}: {str(error).splitlines()[0]}"
        ) from None


def check_column(column_key: str, column: str, table: Dataset, source: str) -> None:
    """``ValueError`` with the columns that there are, unless ``table`` has ``column``."""
    if column not in table.column_names:
        raise ValueError(
            f"{column_key}: found {column!r}, accepted for {source!r}: "
            f"{', '.join(sorted(table.column_names))}"
        )


def is_conversation(cell: Any) -> bool:
    """Whether a cell is a list, not empty, of ``{role, content}`` messages whose contents are texts."""
    return (
        isinstance(cell, list)
        and bool(cell)
        and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in cell)
        and all(isinstance(m["content"], str) for m in cell)
    )
