"""Saving a run: at once, or in the background while training goes on."""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_mega.engine.base import BackgroundSave, RunEngine
from gapo_mega.runs.checkpoints import CheckpointFolder, any_replica
from gapo_mega.runs.disk_space import bytes_below
from gapo_mega.whereabouts import get_on

logger = logging.getLogger(__name__)

TO_LEAVE = 600.0  # seconds that the checkpoint under way has where a run ends before its last step
_BETWEEN_WORDS, _BETWEEN_LOOKS = 30.0, 2.0  # seconds


@dataclass(frozen=True)
class _UnderWay:
    step: int
    directory: Path  # temporary
    files: BackgroundSave
    about: Mapping[str, Any]
    kept: Collection[int]


class Saves:
    """Writes the checkpoints of one run, one at a time. Collective: all ranks call the same methods alike.

    What is under way is no checkpoint before all ranks' files are written, read again and listed.
    """

    def __init__(self, folder: CheckpointFolder, engine: RunEngine, asynchronous: bool) -> None:
        self._folder = folder
        self._engine = engine
        self._asynchronous = asynchronous
        self._under_way: _UnderWay | None = None

    @property
    def under_way(self) -> int | None:
        """The step whose checkpoint is being written; None where there is none."""
        return None if self._under_way is None else self._under_way.step

    def save(self, step: int, extra: dict[str, Any], about: Mapping[str, Any], kept: Collection[int]) -> None:
        """Write the state as it is now; after the one under way, if there is one. Raises ``OSError``.

        Args:
            extra: the run's own state.
            about, kept: as ``CheckpointFolder.save`` takes them.
        """
        self.settle()
        if not self._asynchronous:
            self._folder.save(step, lambda directory: self._engine.save(directory, extra), about, kept)
            return
        directory = self._folder.prepare(step)
        files = self._engine.save_in_background(directory, extra)
        self._under_way = _UnderWay(step, directory, files, dict(about), frozenset(kept))

    def look(self) -> None:
        """Complete the one under way if its files are written. Raises ``OSError`` where that has failed."""
        if self._under_way is not None and self._under_way.files.is_done():
            self._complete(self._under_way)

    def settle(self, within: float = math.inf) -> None:
        """Wait for the one under way, and complete it. Raises ``OSError`` where that has failed.

        ``within``: seconds after which it is given up, which is a failure.
        """
        if self._under_way is None:
            return
        started, told, size = time.monotonic(), 0.0, 0
        while not self._under_way.files.wait(min(_BETWEEN_LOOKS, within)):
            waited = time.monotonic() - started
            before, size = size, _written(self._under_way.directory)
            if size != before:  # else the disk hangs, which the rank's own watch is there for
                get_on()
            if self._engine.layout.is_main and waited - told >= _BETWEEN_WORDS:
                told = waited
                logger.warning(
                    "waiting for the checkpoint of step %d, which is being written: %.0f s",
                    self._under_way.step,
                    waited,
                )
            if any_replica(self._engine, waited > within):
                break
        self._complete(self._under_way)

    def _complete(self, found: _UnderWay) -> None:
        self._under_way = None  # a failure is told once, and leaves no checkpoint
        own = found.files.finish()
        self._folder.complete(found.step, found.directory, found.about, found.kept, own)


def _written(directory: Path) -> int:
    """Bytes of the files so far; -1 where one was renamed meanwhile."""
    try:
        return bytes_below(directory)
    except FileNotFoundError:
        return -1
