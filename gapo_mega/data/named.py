"""Data sets of the hub and local directories, read by ``datasets``."""

from __future__ import annotations

import os
import re
import shutil
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gapo_mega.files import local

_ENDINGS = ".jsonl, .json, .parquet, .jsonl.gz, .json.gz"
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_PATTERN = re.compile(r"[*?\[]")  # what datasets would read as one, in the name of a directory


@dataclass(frozen=True)
class NamedSplit:
    """One split of a data set, with the names that errors call its parts by."""

    parameter: str
    name: str
    split_parameter: str
    split: str
    subset_parameter: str = "data.subset"
    subset: str | None = None


@dataclass(frozen=True)
class _Place:
    """What ``datasets`` is given."""

    path: str
    subset: str | None
    cache: str | None


def is_hub_name(name: str) -> bool:
    """Whether ``name`` can only be a data set of the hub: of that form, and nothing local is called so."""
    return _HUB_NAME.fullmatch(name) is not None and not local(name).exists()


def read_named(
    wanted: NamedSplit, limit: int | None = None
) -> tuple[Sequence[str], Sequence[dict[str, Any]]]:
    """Columns and rows of a data set of the hub, or of a local directory; its first ``limit`` rows if given.

    ``subset`` is what ``datasets`` calls ``name``: a configuration of the data set, or else a folder of the
    directory. A local directory is read anew every time: the cache of ``datasets`` knows files by time stamp.

    Raises ``ValueError`` in one line if there is no such data set, subset or split.
    """
    directory = local(wanted.name)
    if not directory.is_dir():
        if not is_hub_name(wanted.name):
            found = "no such directory" if not directory.is_file() else "a file with another ending"
            raise ValueError(f"{wanted.parameter}: found {wanted.name!r}, accepted: {_accepted()} ({found})")
        return _loaded(wanted, _Place(wanted.name, wanted.subset, None), limit)
    scratch = Path(tempfile.mkdtemp(prefix="gapo-mega-data-"))
    rows: Sequence[dict[str, Any]] = []
    try:
        place, subset = _plain(directory, scratch / "data", wanted.subset)
        columns, rows = _loaded(wanted, _Place(place, subset, str(scratch / "cache")), limit)
    finally:
        if isinstance(rows, list):
            shutil.rmtree(scratch)
        else:  # rows are read from there as long as somebody has them
            weakref.finalize(rows, shutil.rmtree, scratch, ignore_errors=True)
    return columns, rows


def _loaded(
    wanted: NamedSplit, place: _Place, limit: int | None
) -> tuple[Sequence[str], Sequence[dict[str, Any]]]:
    from datasets import load_dataset

    with _one_line_errors(wanted, place):
        table = load_dataset(
            place.path,
            name=place.subset,
            split=wanted.split,
            cache_dir=place.cache,
            streaming=limit is not None,
        )
        if limit is None:
            return table.column_names, table
        rows = list(islice(table, limit))
        return list(dict.fromkeys(key for row in rows for key in row)), rows


@contextmanager
def _one_line_errors(wanted: NamedSplit, place: _Place) -> Iterator[None]:
    from datasets.exceptions import DatasetsError

    key, found = wanted.parameter, f"found {wanted.name!r}"
    try:
        yield
    except ConnectionError as error:
        raise ValueError(
            f"{key}: {found}, but the Hugging Face hub cannot be reached ({_first(error)}); accepted "
            f"offline: a file ending in {_ENDINGS}, a directory, package:NAME, or what is already in the cache"
        ) from None
    except (DatasetsError, OSError) as error:
        reason = _first(error.__cause__ or error)
        raise ValueError(f"{key}: {found}, accepted: {_accepted()} ({reason})") from None
    except ValueError as error:  # what datasets raises for an unknown split or subset
        problem = _subset_problem(place)
        if problem is not None:
            subset = "nothing" if wanted.subset is None else repr(wanted.subset)
            raise ValueError(
                f"{wanted.subset_parameter}: found {subset}, accepted for {wanted.name!r}: {problem}"
            ) from None
        raise ValueError(
            f"{wanted.split_parameter}: found {wanted.split!r} of {wanted.name!r}: {_first(error)}"
        ) from None


def _plain(directory: Path, copy: Path, subset: str | None) -> tuple[str, str | None]:
    """The directory to read under a name without pattern, and the subset that is no folder of it."""
    if subset is not None and (directory / subset).is_dir() and subset not in _subsets(str(directory)):
        directory, subset = directory / subset, None
    directory = directory.resolve()  # as datasets does
    if not _PATTERN.search(str(directory)):
        return str(directory), subset
    for root, folders, files in os.walk(directory):
        into = copy / Path(root).relative_to(directory)
        into.mkdir()
        for name in [*files, *(folder for folder in folders if (Path(root) / folder).is_symlink())]:
            (into / name).symlink_to(Path(root) / name)
    return str(copy), subset


def _subset_problem(place: _Place) -> str | None:
    """The subsets that are accepted, where ``place`` has none of them."""
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(place.path, name=place.subset, cache_dir=place.cache)
    except ValueError as error:
        return ", ".join(_subsets(place.path)) or _first(error)
    return None


def _subsets(place: str) -> list[str]:
    """The configurations of a data set, as far as they can be found out."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetsError

    try:
        return sorted(get_dataset_config_names(place))
    except (DatasetsError, OSError, ValueError):
        return []


def _accepted() -> str:
    return f"a hub name, a file ending in {_ENDINGS}, a directory with data files, or package:NAME"


def _first(error: BaseException) -> str:
    """The first line of a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
