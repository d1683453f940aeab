"""The files of a checkpoint as ``complete.json`` lists them: their sizes, and CRC-32 of their contents."""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

MARKER = "complete.json"
FILES = "files"  # key of it: by name, the size in bytes and the CRC-32 in hexadecimal digits
SIZE, CRC = "bytes", "crc32"

_PIECE = 4 << 20  # bytes read at once

Listing = Mapping[str, Mapping[str, Any]]


def names_in(directory: Path) -> list[str]:
    """The files below ``directory``, sorted and relative to it, ``complete.json`` aside."""
    names = {path.relative_to(directory).as_posix() for path in directory.rglob("*") if path.is_file()}
    return sorted(names - {MARKER})


def measured(path: Path) -> dict[str, Any]:
    """Size and CRC-32 of a file, as ``complete.json`` has them. Raises ``OSError``."""
    size = crc = 0
    with path.open("rb") as file:
        while piece := file.read(_PIECE):
            size += len(piece)
            crc = zlib.crc32(piece, crc)
    return {SIZE: size, CRC: f"{crc:08x}"}


def read_marker(checkpoint: Path) -> dict[str, Any]:
    """What ``complete.json`` of ``checkpoint`` holds; ``ValueError`` says what is wrong with it."""
    path = checkpoint / MARKER
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise ValueError(f"{MARKER}: found none, accepted: what was written there") from None
    except OSError as error:
        raise ValueError(f"{MARKER} cannot be read: {error.strerror or error}") from None
    except (ValueError, RecursionError):
        raise ValueError(f"{MARKER}: found what is no JSON, accepted: what was written there") from None
    if not isinstance(found, dict):
        raise ValueError(f"{MARKER}: found a {type(found).__name__}, accepted: a mapping")
    return found


def listing_of(marker: Mapping[str, Any]) -> Listing | None:
    """The files that ``marker`` lists; None for one of a version that listed none.

    Raises ``ValueError`` for a list that nobody has written so.
    """
    if FILES not in marker:
        return None
    found = marker[FILES]
    if not isinstance(found, dict) or not all(_is_entry(entry) for entry in found.values()):
        raise ValueError(f"{MARKER}: found {FILES!r} that are no list of files, accepted: what was written")
    return found


def size_fault(checkpoint: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with the size of file ``name``; None where nothing is."""
    try:
        size = (checkpoint / name).stat().st_size
    except FileNotFoundError:
        return f"{name} is missing"
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if size != expected[SIZE]:
        return f"{name} has {size} bytes, and {expected[SIZE]} were written"
    return None


def fault(checkpoint: Path, name: str, expected: Mapping[str, Any]) -> str | None:
    """What is wrong with file ``name``, which is read whole; None where nothing is."""
    found = size_fault(checkpoint, name, expected)
    if found is not None:
        return found
    try:
        crc = measured(checkpoint / name)[CRC]
    except OSError as error:
        return f"{name} cannot be read: {error.strerror or error}"
    if crc != expected[CRC]:
        return f"{name} has other contents than were written (CRC-32 {crc}, written {expected[CRC]})"
    return None


def check_sizes(checkpoint: Path, parameter: str) -> None:
    """Raise ``ValueError`` where files of a run's checkpoint are missing or cut off.

    Takes any directory: one without ``complete.json``, or with one that lists no files, is taken as it is.
    ``parameter``: what named the checkpoint.
    """
    if not (checkpoint / MARKER).is_file():
        return
    try:
        listing = listing_of(read_marker(checkpoint)) or {}
    except ValueError as error:
        raise ValueError(_damaged(parameter, checkpoint, str(error))) from None
    for name, expected in listing.items():
        found = size_fault(checkpoint, name, expected)
        if found is not None:
            raise ValueError(_damaged(parameter, checkpoint, found))


def _damaged(parameter: str, checkpoint: Path, reason: str) -> str:
    return (
        f"{parameter}: found {checkpoint}, which is damaged: {reason}; accepted: a checkpoint that is whole"
    )


def _is_entry(entry: object) -> bool:
    return isinstance(entry, dict) and type(entry.get(SIZE)) is int and isinstance(entry.get(CRC), str)
