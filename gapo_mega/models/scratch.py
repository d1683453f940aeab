"""Directories that are only there while something is written, and what a killed process left of them.

Each holds a file that says who made it, which its process keeps locked. What has no such file is nobody's of
ours, and what is locked is still being written.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

MADE_BY = ".gapo-mega.made-by.json"
_QUIET = 3600.0  # seconds without a change after which another host's directory counts as left


class Maker:
    """This process's claim on a directory, which goes where the directory goes."""

    def __init__(self, directory: Path) -> None:
        self._file: IO[str] = (directory / MADE_BY).open("w", encoding="utf-8")
        # Without locks, as on some shared file systems, what is left stays: nobody can know that it is.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        self.note()

    def note(self, **facts: str) -> None:
        """Write down ``facts`` for whoever finds the directory left."""
        about = {"host": socket.gethostname(), "pid": os.getpid(), **facts}
        self._file.seek(0)
        self._file.write(json.dumps(about) + "\n")
        self._file.truncate()
        self._file.flush()
        os.fsync(self._file.fileno())

    def leave(self, directory: Path) -> None:
        """Take the file out of ``directory``, as it is called now."""
        (directory / MADE_BY).unlink(missing_ok=True)
        self._file.close()


@contextmanager
def scratch(parent: Path, prefix: str) -> Iterator[tuple[Path, Maker]]:
    """A new directory ``parent/prefix...`` that all may read, which goes when the block ends."""
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    path.chmod(0o755)  # mkdtemp makes it private
    maker = Maker(path)
    try:
        yield path, maker
    finally:
        maker.leave(path)
        if path.exists():
            shutil.rmtree(path)


def left(parent: Path, prefix: str) -> list[Path]:
    """The scratch directories ``parent/prefix...`` whose processes have ended. Raises ``OSError``."""
    if not parent.is_dir():
        return []
    found = [path for path in parent.iterdir() if path.name.startswith(prefix) and not path.is_symlink()]
    return sorted(path for path in found if facts_of(path) is not None)


def facts_of(directory: Path) -> dict[str, Any] | None:
    """What the maker of ``directory`` noted; None where it still writes, and where it is not of ours."""
    note = directory / MADE_BY
    if note.is_symlink() or not note.is_file():
        return None
    try:
        with note.open("r+", encoding="utf-8") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            facts = json.load(file)
    except OSError:  # locked, or another user's
        return None
    except ValueError:  # killed before it had written it
        facts = {}
    if not isinstance(facts, dict):
        return None
    # Locks may not reach from one host to another.
    if facts.get("host") != socket.gethostname() and time.time() - _last_change(directory) < _QUIET:
        return None
    return facts


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the scratch directories that killed processes left, and say so. Raises ``OSError``."""
    for path in left(parent, prefix):
        size = size_of(path)
        shutil.rmtree(path)
        tell_removed(path, size)


def tell_removed(path: Path, size: int) -> None:
    """Log that what was at ``path``, ``size`` bytes, has been removed."""
    logger.warning("removed %s (%.1f MB), which a killed process had not finished", path, size / 1e6)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def _last_change(directory: Path) -> float:
    return max(path.lstat().st_mtime for path in [directory, *directory.rglob("*")])
