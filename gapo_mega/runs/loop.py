"""The one loop of every run: training on objectives, fine-tuning, reward models.

The loop decides when: steps, checkpoints, resuming, signals, the end. A ``Work`` decides what: what a step
does, what a checkpoint must hold of it, what to write at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Protocol

from gapo_mega.config import CheckpointConfig
from gapo_mega.engine.base import RunEngine
from gapo_mega.runs.checkpoints import (
    CHECKPOINTS_FOLDER,
    RECORD,
    UPDATES,
    CheckpointFolder,
    StopOnSignal,
    any_replica,
    check_updates,
    checkpoint_to_resume,
    is_due,
)
from gapo_mega.runs.cut_lines import keep_cut_lines
from gapo_mega.runs.log import RunLog

logger = logging.getLogger(__name__)


class Work(Protocol):
    """What a run does. Every rank has one; all call the same methods in the same order."""

    @property
    def total_steps(self) -> int:
        """Steps of the whole run."""
        ...

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps, and so lines of the log, of one step."""
        ...

    def begin(self) -> None:
        """Called once, after a checkpoint was loaded and before the first step of this process."""
        ...

    def train_step(self, step: int) -> None:
        """Do step ``step``, which counts from 0 over the whole run, and log its updates."""
        ...

    def finish(self) -> None:
        """Called after the last step. No signal interrupts it: what was trained is not lost."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside models, optimizers and the number of steps."""
        ...

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for the state of another configuration.

        ``checkpoint``: where the state comes from, for the error.
        """
        ...


class RunLoop:
    """Runs a ``Work`` to its end, or to a signal; then the same command goes on from there."""

    def __init__(
        self,
        work: Work,
        engine: RunEngine,
        directory: Path,
        settings: CheckpointConfig,
        log: RunLog,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        """``directory``: the run's. The steps in ``log`` end before the work's ``finish``; loggers see it.

        ``record``: what checkpoints say that they belong to, in JSON.
        """
        self._directory = directory
        self._record = record
        self._work = work
        self._engine = engine
        self._settings = settings
        self._log = log
        self._checkpoints = CheckpointFolder(
            directory / CHECKPOINTS_FOLDER, settings.keep, engine.layout, engine.barrier
        )
        self.step = 0  # steps done

    def run(self) -> bool:
        """Do the work. True if it is finished; False after SIGTERM or SIGINT, with a checkpoint written.

        A signal during the last step does not count: nothing is left to stop.
        """
        total = self._work.total_steps
        self._resume()
        self._work.begin()
        updates = self.step * self._work.updates_per_step
        if self._engine.layout.is_main:
            keep_cut_lines(self._directory, updates)
        self._log.truncate_after(updates)
        with self._log, StopOnSignal() as stop:
            while self.step < total:
                self._work.train_step(self.step)
                self.step += 1
                if any_replica(self._engine, stop.requested) and self.step < total:
                    self._save()
                    self._log.close()
                    logger.warning(
                        "stopped by a signal after step %d; the same command goes on from there", self.step
                    )
                    return False
                if is_due(self._settings, self.step, total):
                    self._save()
            self._log.end_steps()
            self._work.finish()
            self._log.conclude()
        return True

    def _save(self) -> None:
        """Write a complete checkpoint of the current step; all ranks call it."""
        extra = {"step": self.step, **self._work.state_dict()}
        about: dict[str, Any] = {UPDATES: self.step * self._work.updates_per_step}
        if self._record is not None:
            about[RECORD] = self._record
        self._checkpoints.save(self.step, lambda directory: self._engine.save(directory, extra), about)

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        latest = checkpoint_to_resume(self._checkpoints, self._settings, self._engine)
        if latest is None:
            return
        check_updates(latest, self._work.updates_per_step)
        extra = self._engine.load(latest)
        self._work.load_state_dict(extra, latest)
        self.step = int(extra["step"])
        logger.info("resumed from %s: %d of %d steps done", latest, self.step, self._work.total_steps)
