"""One owner of a directory: a lock that ends with its process, and a note that says who has it.

The operating system holds the lock (``filelock``), so a killed process leaves none behind. On a file system
whose locks do not reach other hosts, the note does their work: its owner touches it every ``BEAT`` seconds,
and whoever finds another host's note watches for ``BEATS`` of these before the directory counts as free.
"""

from __future__ import annotations

import json
import logging
import os
import socket
import threading
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any

from filelock import FileLock, Timeout

from gapo_mega.evaluation.files import write_data

logger = logging.getLogger(__name__)

LOCK_FILE = ".gapo-mega.lock"
OWNER_FILE = ".gapo-mega.owner.json"
BEAT = 5.0  # seconds
BEATS = 4


class DirectoryLock:
    """Holds ``directory``, which it makes if need be, for this process.

    Args:
        directory: what to hold.
        command: who asks, for the one who comes second.
        parameter: what errors call the directory.
    """

    def __init__(self, directory: Path, command: str, parameter: str = "output_dir") -> None:
        self.directory = directory
        self.token = uuid.uuid4().hex  # of this hold, so that other ranks see whether it is their directory
        self._command = command
        self._parameter = parameter
        self._lock = FileLock(directory / LOCK_FILE, thread_local=False)
        self._made: list[Path] = []
        self._released = threading.Event()

    def acquire(self) -> None:
        """Take the directory. Raises ``ValueError`` where somebody has it, and where it cannot be written."""
        with disk_errors(self.directory, self._parameter):
            self._make()
            try:
                self._lock.acquire(blocking=False)
            except Timeout:
                raise _in_use(self.directory, self._parameter) from None
            try:
                self._watch_other_host()
                about = {
                    "command": self._command,
                    "pid": os.getpid(),
                    "host": socket.gethostname(),
                    "since": time.strftime("%Y-%m-%d %H:%M:%S %z"),
                    "token": self.token,
                }
                write_data(self.directory / OWNER_FILE, json.dumps(about) + "\n")
            except BaseException:
                self._leave(and_lock_file=bool(self._made))  # another host's stays
                raise
        threading.Thread(target=self._beat, daemon=True).start()

    def release(self) -> None:
        """Give the directory back; one that was made and holds nothing goes again."""
        if not self._lock.is_locked:
            return
        self._released.set()
        (self.directory / OWNER_FILE).unlink(missing_ok=True)
        self._leave(and_lock_file=True)

    def _leave(self, and_lock_file: bool) -> None:
        if and_lock_file:
            # While it is held: filelock sees that a file it waited for has gone, and makes a new one.
            (self.directory / LOCK_FILE).unlink(missing_ok=True)
        self._lock.release()
        for made in reversed(self._made):
            if _names(made):
                break
            made.rmdir()

    def __enter__(self) -> DirectoryLock:
        self.acquire()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.release()

    def _make(self) -> None:
        missing = [path for path in (self.directory, *self.directory.parents) if not path.exists()]
        self.directory.mkdir(parents=True, exist_ok=True)
        self._made = missing[::-1]

    def _watch_other_host(self) -> None:
        """Raise ``ValueError`` where the note's owner, on another host, still touches it."""
        owner = _owner(self.directory)
        if owner is None or owner.get("host") == socket.gethostname():
            return
        logger.info("%s: left by %s; looking whether it still runs", self.directory, _described(owner))
        first = _last_touched(self.directory)
        for _ in range(2 * BEATS):
            time.sleep(BEAT / 2)
            if _last_touched(self.directory) != first:
                raise _in_use(self.directory, self._parameter)
        logger.warning("%s: taken over from %s, which has ended", self.directory, _described(owner))

    def _beat(self) -> None:
        note = self.directory / OWNER_FILE
        while not self._released.wait(BEAT):
            try:
                os.utime(note)
            except OSError:  # the directory has gone, or its disk is away: the lock itself still holds
                logger.debug("%s could not be touched", note)


def check_free(directory: Path, parameter: str = "output_dir") -> None:
    """Raise ``ValueError`` where a process of this host has ``directory``. Leaves nothing behind."""
    if not (directory / LOCK_FILE).exists():
        return
    lock = FileLock(directory / LOCK_FILE)
    with disk_errors(directory, parameter):
        try:
            lock.acquire(blocking=False)
        except Timeout:
            raise _in_use(directory, parameter) from None
        lock.release()


def token_in(directory: Path) -> str | None:
    """The token of whoever has ``directory``; None where nobody says so."""
    owner = _owner(directory)
    return None if owner is None else str(owner.get("token"))


@contextmanager
def disk_errors(directory: Path, parameter: str = "output_dir") -> Iterator[None]:
    """Turn errors of the disk into a ``ValueError`` of one line."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        where = f" ({error.filename})" if error.filename and str(error.filename) != str(directory) else ""
        raise ValueError(
            f"{parameter}: found {directory}, which cannot be written: {reason}{where}; accepted: a "
            "directory to write to, with space on its disk"
        ) from error


def _in_use(directory: Path, parameter: str) -> ValueError:
    owner = _owner(directory)
    by = "another process, which has just begun" if owner is None else _described(owner)
    return ValueError(
        f"{parameter}: found {directory}, which is in use by {by}; accepted: another directory, or to wait "
        "until that one has ended"
    )


def _described(owner: dict[str, Any]) -> str:
    return (
        f"{owner.get('command')}, process {owner.get('pid')} on host {owner.get('host')}, since "
        f"{owner.get('since')}"
    )


def _owner(directory: Path) -> dict[str, Any] | None:
    try:
        found = json.loads((directory / OWNER_FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError):  # nobody has it, or its owner was killed while it wrote this
        return None
    return found if isinstance(found, dict) else None


def _last_touched(directory: Path) -> tuple[int, str | None]:
    try:
        # Opened, since network file systems look again at a file when it is opened.
        with (directory / OWNER_FILE).open() as file:
            return os.fstat(file.fileno()).st_mtime_ns, token_in(directory)
    except OSError:
        return 0, None


def _names(directory: Path) -> set[str]:
    return {path.name for path in directory.iterdir()} if directory.is_dir() else set()
