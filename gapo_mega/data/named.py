"""Data sets of the hub and local directories, read by ``datasets``."""

from __future__ import annotations

import logging
import os
import re
import tempfile
import weakref
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

from gapo_mega.files import local
from gapo_mega.scratch import TEMPORARY, scratch

logger = logging.getLogger(__name__)

_ENDINGS = ".jsonl, .json, .parquet, .jsonl.gz, .json.gz"
_LONGEST = 193  # characters: the hub allows 96 for the owner and for the name
_MOST_FILES = 20_000  # of a directory
_HUB_NAME = re.compile(r"[\w.-]+(/[\w.-]+)?")
_ODD = re.compile(r"[^\w./ -]")  # what datasets, or fsspec below it, may read as more than a name
_VARIABLE = re.compile(r"[$~%]")  # in a file's name, the part of this that matters


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
    # os.path: to pathlib, a name that no file system takes is no answer but an OSError.
    return len(name) <= _LONGEST and _HUB_NAME.fullmatch(name) is not None and not os.path.exists(local(name))


def read_named(
    wanted: NamedSplit, limit: int | None = None
) -> tuple[Sequence[str], Sequence[dict[str, Any]]]:
    """Columns and rows of a data set of the hub, or of a local directory; its first ``limit`` rows if given.

    ``subset`` is what ``datasets`` calls ``name``: a configuration of the data set, or else a folder of the
    directory. A local directory is read anew every time: the cache of ``datasets`` knows files by time stamp.

    Raises ``ValueError`` in one line if there is no such data set, subset or split.
    """
    directory = local(wanted.name)
    if not os.path.isdir(directory):
        if not is_hub_name(wanted.name):
            found = "no such directory" if not os.path.isfile(directory) else "a file with another ending"
            raise ValueError(f"{wanted.parameter}: found {wanted.name!r}, accepted: {_accepted()} ({found})")
        return _loaded(wanted, _Place(wanted.name, wanted.subset, None), limit)
    _check_count(wanted, directory)
    if _is_saved(directory):
        return _saved(wanted, directory, limit)
    with ExitStack() as stack:
        kept = scratch(Path(tempfile.gettempdir()), f"{TEMPORARY}data-", lasting=True)
        folder, _ = stack.enter_context(kept)
        place, subset = _plain(directory, folder / "data", wanted.subset)
        columns, rows = _loaded(wanted, _Place(place, subset, str(folder / "cache")), limit)
        if not isinstance(rows, list):  # rows are read from there as long as somebody has them
            weakref.finalize(rows, _remove, stack.pop_all())
    return columns, rows


def _check_count(wanted: NamedSplit, directory: Path) -> None:
    """Refuse what holds more than data: ``datasets`` would look at every file below, some times over."""
    count = 0
    for _, folders, files in os.walk(directory):
        count += len(folders) + len(files)
        if count > _MOST_FILES:
            raise ValueError(
                f"{wanted.parameter}: found {wanted.name!r} with more than {_MOST_FILES} files and "
                "directories below it, accepted: a directory with the data files alone"
            )


def _remove(kept: ExitStack) -> None:
    with suppress(OSError):
        kept.close()


def _is_saved(directory: Path) -> bool:
    """Whether ``save_to_disk`` wrote it; ``load_dataset`` would also read what ``map`` leaves there."""
    return any((directory / name).is_file() for name in ("dataset_dict.json", "state.json"))


def _saved(
    wanted: NamedSplit, directory: Path, limit: int | None
) -> tuple[Sequence[str], Sequence[dict[str, Any]]]:
    """Rows of a split that ``save_to_disk`` wrote; a data set without splits is one, as a file is."""
    from datasets import DatasetDict, load_from_disk

    if wanted.subset is not None:
        raise ValueError(
            f"{wanted.subset_parameter}: found {wanted.subset!r} with {wanted.name!r}, which save_to_disk "
            "has written; accepted: null"
        )
    try:
        found = load_from_disk(str(directory.resolve()))
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(
            f"{wanted.parameter}: found {wanted.name!r}, accepted: a directory as save_to_disk writes it "
            f"({_first(error)})"
        ) from None
    splits = sorted(found) if isinstance(found, DatasetDict) else [str(found.split or wanted.split)]
    if wanted.split not in splits:
        raise ValueError(
            f"{wanted.split_parameter}: found {wanted.split!r}, accepted for {wanted.name!r}: "
            f"{', '.join(splits)}"
        )
    table = found[wanted.split] if isinstance(found, DatasetDict) else found
    return table.column_names, table if limit is None else list(islice(table, limit))


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
            f"offline: a file ending in {_ENDINGS}, a directory, package:NAME, or what is cached"
        ) from None
    except (DatasetsError, OSError) as error:
        reason = _first(error.__cause__ or error)
        folders = _folders(local(wanted.name))
        if isinstance(error, DatasetsError) and folders and wanted.subset is None:
            raise ValueError(
                f"{wanted.subset_parameter}: found nothing for {wanted.name!r}, whose files do not fit "
                f"together ({reason}); accepted: {', '.join(folders)}"
            ) from None
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
    """The directory, or links to it under plain names, and the subset that is no folder of it."""
    if subset is not None and (directory / subset).is_dir() and subset not in _subsets(str(directory)):
        directory, subset = directory / subset, None
    if subset is None and len(folders := _folders(directory)) > 1 and len(_subsets(str(directory))) <= 1:
        logger.info("%s: the folders %s are read together; a subset is one", directory, ", ".join(folders))
    directory = directory.resolve()  # as datasets does
    tree = list(os.walk(directory))
    odd = _ODD.search(str(directory)) is not None
    if not odd and not any(_VARIABLE.search(name) for _, dirs, files in tree for name in (*dirs, *files)):
        return str(directory), subset
    for root, dirs, files in tree:
        into = copy / _VARIABLE.sub("_", str(Path(root).relative_to(directory)))
        into.mkdir(exist_ok=True)
        links = [name for name in dirs if (Path(root) / name).is_symlink()]
        for number, name in enumerate([*files, *links]):
            plain = _VARIABLE.sub("_", name)
            plain = plain if not (into / plain).exists() else f"{number}-{plain}"
            (into / plain).symlink_to(Path(root) / name)
    return str(copy), subset


def _subset_problem(place: _Place) -> str | None:
    """The subsets that are accepted, where ``place`` has none of them."""
    from datasets import load_dataset_builder

    try:
        load_dataset_builder(place.path, name=place.subset, cache_dir=place.cache)
    except ValueError as error:
        names = [name for name in _subsets(place.path) if name != "default"]
        return ", ".join(names or _folders(local(place.path))) or _first(error)
    return None


def _subsets(place: str) -> list[str]:
    """The configurations of a data set, as far as they can be found out."""
    from datasets import get_dataset_config_names
    from datasets.exceptions import DatasetsError

    try:
        return sorted(get_dataset_config_names(place))
    except (DatasetsError, OSError, ValueError):
        return []


def _folders(directory: Path) -> list[str]:
    """The names of the folders in a local directory."""
    if not directory.is_dir():
        return []
    return sorted(f.name for f in directory.iterdir() if f.is_dir() and not f.name.startswith((".", "__")))


def _accepted() -> str:
    return f"a hub name, a file ending in {_ENDINGS}, a directory with data files, or package:NAME"


def _first(error: BaseException) -> str:
    """The first line of a message."""
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
