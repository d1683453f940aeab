"""Directories that are only there while something is written or read, and what a killed process left of them.

Each holds a file that says who made it, which its process keeps locked. What has no such file is nobody's of
ours, and what is locked is still in use. Other users' are left alone.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import socket
import stat
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

logger = logging.getLogger(__name__)

MADE_BY = ".gapo-mega.made-by.json"
TEMPORARY = "gapo-mega-"  # begins the names of those among a machine's temporary files
_BOOT = Path("/proc/sys/kernel/random/boot_id")  # the same in all containers of a machine
_QUIET = 3600.0  # seconds without a change after which another machine's directory counts as left


class Maker:
    """This process's claim on a directory, which goes where the directory goes.

    Attributes:
        kept: whether the directory outlives its block.
    """

    def __init__(self, directory: Path, **facts: Any) -> None:
        self._facts: dict[str, Any] = {
            "host": socket.gethostname(),
            "boot": _boot(),
            "pid": os.getpid(),
            **facts,
        }
        self.kept = False
        self._file: IO[str] = (directory / MADE_BY).open("w", encoding="utf-8")
        # Waits for whoever looks whether it is left. Without locks, as on some shared file systems, what is
        # left stays: nobody can know that it is.
        with suppress(OSError):
            fcntl.flock(self._file, fcntl.LOCK_EX)
        self.note()

    def note(self, **facts: Any) -> None:
        """Write down ``facts``, too, for whoever finds the directory left."""
        self._facts |= facts
        self._file.seek(0)
        self._file.write(json.dumps(self._facts) + "\n")
        self._file.truncate()
        self._file.flush()
        os.fsync(self._file.fileno())

    def keep(self, seconds: float) -> None:
        """Let the directory stay when its block ends, for so long; then it counts as left."""
        self.note(until=time.time() + seconds)
        self.kept = True

    def leave(self, directory: Path) -> None:
        """Take the file out of ``directory``, as it is called now."""
        (directory / MADE_BY).unlink(missing_ok=True)
        self.close()

    def close(self) -> None:
        """Let go of the lock."""
        self._file.close()


@contextmanager
def scratch(parent: Path, prefix: str, lasting: bool = False) -> Iterator[tuple[Path, Maker]]:
    """A new directory ``parent/prefix...`` for this user alone, which goes when the block ends.

    ``lasting``: that nothing changes there for long does not mean that its process has ended.
    """
    path = Path(tempfile.mkdtemp(prefix=prefix, dir=parent))
    try:
        maker = Maker(path, lasting=lasting)
    except OSError:
        shutil.rmtree(path)
        raise
    try:
        yield path, maker
    finally:
        if maker.kept:
            maker.close()
        else:
            if path.exists():
                _remove(path)
            maker.leave(path)


def left(parent: Path, prefix: str) -> list[Path]:
    """The scratch directories ``parent/prefix...`` whose processes have ended. Raises ``OSError``."""
    return [path for path in _ours(parent, prefix) if facts_of(path) is not None]


def facts_of(directory: Path) -> dict[str, Any] | None:
    """What the maker of ``directory`` noted; None where it is still in use, and where it is not of ours."""
    taken = _take(directory)
    if taken is None:
        return None
    note, facts = taken
    note.close()
    return facts


def remove_left(parent: Path, prefix: str) -> None:
    """Remove the scratch directories that killed processes left, and say so.

    They are in nobody's way: what cannot be removed stays, and is told.
    """
    try:
        for path in _ours(parent, prefix):
            taken = _take(path)
            if taken is not None:
                with taken[0]:  # nobody else removes it meanwhile
                    size = size_of(path)
                    _remove(path)
                tell_removed(path, size)
    except OSError as error:
        logger.warning("what killed processes left in %s is still there: %s", parent, error)


def tell_removed(path: Path, size: int) -> None:
    """Log that what was at ``path``, ``size`` bytes, has been removed."""
    logger.warning("removed %s (%.1f MB), which a killed process had not finished", path, size / 1e6)


def size_of(path: Path) -> int:
    """Bytes of a file, or of all files below a directory."""
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return sum(file.lstat().st_size for file in files)


def _ours(parent: Path, prefix: str) -> list[Path]:
    """Directories ``parent/prefix...`` of this user; what is behind links is not looked at."""
    if not parent.is_dir():
        return []
    named = [path for path in parent.iterdir() if path.name.startswith(prefix)]
    return sorted(path for path in named if _is_own_directory(path))


def _is_own_directory(path: Path) -> bool:
    try:
        found = path.lstat()
    except FileNotFoundError:  # gone meanwhile
        return False
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.geteuid()


def _take(directory: Path) -> tuple[IO[str], dict[str, Any]] | None:
    """The note of a directory that is left, locked until it is closed, and what it says; else None."""
    path = directory / MADE_BY
    try:
        if path.is_symlink() or not path.is_file():
            return None
        note = path.open("r+", encoding="utf-8")
    except OSError:  # another user's
        return None
    try:
        fcntl.flock(note, fcntl.LOCK_EX | fcntl.LOCK_NB)
        facts = json.load(note)
    except OSError:  # in use
        facts = None
    except ValueError:  # killed before it had written it
        facts = {}
    gone = os.fstat(note.fileno()).st_nlink == 0
    if gone or not isinstance(facts, dict) or not _has_ended(facts, directory):
        note.close()
        return None
    return note, facts


def _has_ended(facts: dict[str, Any], directory: Path) -> bool:
    """Whether the maker of ``directory``, whose lock nobody holds here, has ended, and all waits are over."""
    if time.time() < facts.get("until", 0.0):
        return False
    if facts.get("host") == socket.gethostname() or (_boot() is not None and facts.get("boot") == _boot()):
        return True
    # Locks may not reach from one machine to another.
    return not facts.get("lasting") and time.time() - _last_change(directory) >= _QUIET


def _boot() -> str | None:
    """What tells this start of this machine from all others; None where the system does not say."""
    return _BOOT.read_text(encoding="ascii").strip() if _BOOT.is_file() else None


def _remove(directory: Path) -> None:
    """Remove it, its note last: what a kill leaves of it is still known to be ours."""
    for path in directory.iterdir():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        elif path.name != MADE_BY:
            path.unlink()
    shutil.rmtree(directory)


def _last_change(directory: Path) -> float:
    try:
        return max(path.lstat().st_mtime for path in [directory, *directory.rglob("*")])
    except FileNotFoundError:  # what is removed meanwhile is a change
        return time.time()
