"""The one loop of every run: training on objectives, fine-tuning, reward models.

The loop decides when: steps, checkpoints, resuming, signals, the end. A ``Work`` decides what: what a step
does, what a checkpoint must hold of it, what to write at the end.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from gapo_mega.config import CheckpointConfig
from gapo_mega.engine.base import RunEngine
from gapo_mega.runs.checkpoints import (
    BEST,
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
from gapo_mega.runs.selection import Selection

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
        selection: Selection | None = None,
    ) -> None:
        """``directory``: the run's. The steps in ``log`` end before the work's ``finish``; loggers see it.

        ``record``: what checkpoints say that they belong to, in JSON. ``selection``: what the work tells its
        evaluations; the checkpoint of the best one is written and stays, and it may end the run early.
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
        self._selection = selection or Selection(None, None)
        self.step = 0  # steps done

    def run(self) -> bool:
        """Do the work. True if it is finished; False after SIGTERM or SIGINT, with a checkpoint written.

        A signal during the last step does not count: nothing is left to stop.
        """
        self._resume()
        self._work.begin()
        updates = self.step * self._work.updates_per_step
        if self._engine.layout.is_main:
            keep_cut_lines(self._directory, updates)
        self._log.truncate_after(updates)
        with self._log, StopOnSignal() as stop:
            while not self._is_over():
                self._work.train_step(self.step)
                self.step += 1
                over = self._is_over()
                if any_replica(self._engine, stop.requested) and not over:
                    self._save()
                    self._log.close()
                    logger.warning(
                        "stopped by a signal after step %d; the same command goes on from there", self.step
                    )
                    return False
                if is_due(self._settings, self.step, over) or self.step in self._selection.kept:
                    self._save()
            self._log.end_steps()
            if self._selection.stops:
                logger.warning("stopped early after step %d: %s", self.step, self._selection.reason())
            self._work.finish()
            self._log.conclude()
        return True

    def _is_over(self) -> bool:
        return self.step >= self._work.total_steps or self._selection.stops

    def best_checkpoint(self) -> Path | None:
        """That of the best evaluation, where it is not the policy as it is now."""
        best = self._selection.best
        if best is None or best.step == self.step:
            return None
        return self._checkpoints.path(best.step)

    def _save(self) -> None:
        """Write a complete checkpoint of the current step; all ranks call it."""
        extra = {"step": self.step, **self._work.state_dict()}
        about: dict[str, Any] = {UPDATES: self.step * self._work.updates_per_step}
        if self._record is not None:
            about[RECORD] = self._record
        if self._selection.best is not None:
            about[BEST] = asdict(self._selection.best)
        kept = self._selection.kept
        self._checkpoints.save(self.step, lambda directory: self._engine.save(directory, extra), about, kept)

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        latest = checkpoint_to_resume(self._checkpoints, self._settings, self._engine)
        if latest is None:
            return
        check_updates(latest, self._work.updates_per_step)
        extra = self._engine.load(latest)
        self._work.load_state_dict(extra, latest)
        self.step = int(extra["step"])
        if not self._selection.kept <= set(self._checkpoints.steps()):
            self._selection.lose(f"{self.best_checkpoint()} is not there")
        logger.info("resumed from %s: %d of %d steps done", latest, self.step, self._work.total_steps)
