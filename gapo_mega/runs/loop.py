"""The one loop of every run: training on objectives, fine-tuning, reward models.

The loop decides when: steps, checkpoints, resuming, signals, the end. A ``Work`` decides what: what a step
does, what a checkpoint must hold of it, what to write at the end.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
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
    step_of,
)
from gapo_mega.runs.cut_lines import keep_cut_lines
from gapo_mega.runs.earlier_ends import set_aside_ends
from gapo_mega.runs.keeping import Keep
from gapo_mega.runs.leaving import Before, absent, meet, obstacle, stand_together
from gapo_mega.runs.log import RunLog
from gapo_mega.runs.processes import Alone, Peers, agree, naming_the_lost
from gapo_mega.runs.saves import TO_LEAVE, Saves
from gapo_mega.runs.selection import Selection
from gapo_mega.stopping import StoppedWaiting, asked_by
from gapo_mega.user_code import reason_of
from gapo_mega.whereabouts import enter, within

logger = logging.getLogger(__name__)

UNENDED = "metrics of a step that was not evaluated"  # in a checkpoint; see ``Work.end_step``


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

    def train_step(self, step: int) -> dict[str, float]:
        """Do step ``step``, which counts from 0 over the whole run, and log its updates but the last.

        Returns the metrics of that one, for ``end_step``.
        """
        ...

    def end_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Evaluate after ``done`` steps if it is time to, and log the last update with what that gives.

        Models, optimizers and ``state_dict`` stay as they were until it returns: where it fails, the step can
        still be saved, and the resumed run ends it.
        """
        ...

    def finish(self) -> None:
        """Called after the last step. No signal interrupts it: what was trained is not lost."""
        ...

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold beside models, optimizers and the number of steps."""
        ...

    def in_flight(self, step: int) -> dict[str, Any]:
        """What else a checkpoint after ``step`` steps must hold, and what may have to be waited for.

        Of ``step`` as ``state_dict`` was then; a later step may have begun, and changed nothing. Collective.
        """
        ...

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Inverse of ``state_dict`` and ``in_flight`` together.

        Raises ``ValueError`` for the state of another configuration.

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
        everyone: Peers | None = None,
        checkpoint_bytes: int = 0,
    ) -> None:
        """``directory``: the run's. The steps in ``log`` end before the work's ``finish``; loggers see it.

        ``record``: what checkpoints say that they belong to, in JSON. ``selection``: what the work tells its
        evaluations; the checkpoint of the best one is written and stays, and it may end the run early.
        ``everyone``: the run's ranks, who agree on what is kept where one of them fails; None: only this one.
        ``checkpoint_bytes``: what a checkpoint takes on the disk at least.
        """
        self._directory = directory
        self._record = record
        self._work = work
        self._engine = engine
        self._settings = settings
        self._log = log
        self._everyone = Alone() if everyone is None else everyone
        self._checkpoints = CheckpointFolder(
            directory / CHECKPOINTS_FOLDER,
            Keep.of(settings),
            engine.layout,
            engine.barrier,
            self._everyone,
            checkpoint_bytes,
        )
        self._saves = Saves(self._checkpoints, engine, settings.asynchronous)
        self._selection = selection or Selection(None, None)
        self._before: Before | None = None  # of the step under way, or of its end
        self._unended: dict[str, float] | None = None  # metrics of the step that is done, until logged
        self.step = 0  # steps done

    def run(self) -> bool:
        """Do the work. True if it is finished; False after SIGTERM, SIGHUP or SIGINT, with a checkpoint.

        A signal during the last step does not count: nothing is left to stop. What a step or the end raises
        comes out as it is, after a checkpoint of the last whole step where that is still to be had.
        """
        enter("resuming")
        self._resume()
        if not self._is_over():
            agree(self._everyone, self._set_ends_aside)
        enter("before training")
        self._work.begin()
        logged = self.step * self._work.updates_per_step - (self._unended is not None)
        if self._engine.layout.is_main:
            keep_cut_lines(self._directory, logged)
        self._log.truncate_after(logged)
        with self._log, StopOnSignal() as stop, asked_by(lambda: stop.requested and self._is_untouched()):
            try:
                with naming_the_lost(self._everyone):
                    return self._to_the_end(stop)
            except StoppedWaiting:
                under_way = self.step + (self._unended is None)
                logger.warning("stopped by a signal while waiting in step %d", under_way)
                self._leave()
                return False
            except SystemExit as error:  # of somebody's code: the run is not done
                self._leave()
                raise RuntimeError(reason_of(error)) from error
            except KeyboardInterrupt:  # the second: at once
                raise
            except BaseException:
                self._leave()
                raise

    def _to_the_end(self, stop: StopOnSignal) -> bool:
        if self._unended is not None:  # the run that is resumed was cut short there
            self._end_step()
        while not self._is_over():
            self._before = self._now()
            enter("training", self.step + 1)
            self._unended = self._work.train_step(self.step)
            self.step += 1
            self._end_step()
            over = self._is_over()
            if any_replica(self._engine, stop.requested) and not over:
                self._stop()
                return False
            self._end_older(self._saves.look)
            if is_due(self._settings, self.step, over) or self.step in self._selection.kept:
                self._end_older(self._saves.settle)
                self._save()
        self._end_older(self._saves.settle)
        self._log.end_steps()
        if self._selection.stops:
            logger.warning("stopped early after step %d: %s", self.step, self._selection.reason())
        self._check_finite()
        self._before = self._now()
        with within("end of the run"):
            self._work.finish()
        self._before = None
        self._log.conclude()
        return True

    def _end_step(self) -> None:
        """Let the step that is done be evaluated and logged."""
        assert self._unended is not None
        self._before = self._now()
        self._work.end_step(self.step, self._unended)
        self._before = self._unended = None

    def _now(self) -> Before:
        return Before.of(self._engine, self._work.state_dict())

    def _stop(self) -> None:
        """Save the step that is done, as a signal asks; an older checkpoint that fails is told, no more."""
        older = self._saves.under_way
        try:
            self._end_older(partial(self._saves.settle, TO_LEAVE))
        except OSError as error:
            logger.warning("stopped by a signal after step %d", self.step)
            logger.error("the checkpoint of step %d could not be written: %s", older, error)
            self._leave()
        else:
            self._save()
            self._settle(TO_LEAVE)
            logger.warning(
                "stopped by a signal after step %d; the same command goes on from there", self.step
            )
        self._log.close()

    def _end_older(self, end: Callable[[], None]) -> None:
        """Let ``end`` complete the checkpoint under way. Raises ``OSError`` where that has failed.

        Where it was of an older step, ``_leave`` then finds the one that is done.
        """
        older = self._saves.under_way
        if older is None:
            return
        try:
            with within("checkpoint"):
                end()
        except OSError:
            if older < self.step:
                self._before = self._now()
            raise

    def _is_untouched(self) -> bool:
        """Whether models and optimizers still are as after step ``self.step``, at its end or in the next."""
        return self._before is not None and self._engine.changes == self._before.changes

    def _leave(self) -> None:
        """Write a checkpoint of the last whole step if it can be had, and say from where the run goes on."""
        if self.step == 0:
            return
        if self._before is not None or self._saves.under_way is not None:
            why = self._save_to_leave(meet(self._everyone, self.step, self._is_untouched()))
            if why is not None:
                logger.error("%s", why)
        self._tell_newest()

    def _save_to_leave(self, told: Sequence[Any]) -> str | None:
        """Save what can be had, and return why that is not all. ``told``: what the ranks stand at."""
        why = absent(told)
        step = self._saves.under_way or self.step
        try:
            if stand_together(told):
                self._settle_to_leave()
            if why is None and self._before is not None:
                step, over = self.step, self._is_over()
                saved = step in self._checkpoints.steps()
                why = None if over and saved else obstacle(told, step, over)
                if why is None and not saved:
                    self._save(self._before.restore(self._engine))
                    self._settle(TO_LEAVE)
        except Exception as error:  # beside the one that ends the run, which is the one to be seen
            why = f"the checkpoint of step {step} could not be written: {error}"
        return why

    def _settle_to_leave(self) -> None:
        """A failure of an older step's checkpoint does not keep from saving the one that is done."""
        older = self._saves.under_way
        try:
            self._settle(TO_LEAVE)
        except OSError as error:
            if older == self.step:
                raise
            logger.error("the checkpoint of step %d could not be written: %s", older, error)

    def _tell_newest(self) -> None:
        if not self._engine.layout.is_main:
            return
        newest = self._checkpoints.latest()
        if newest is None:
            logger.error("there is no complete checkpoint: the same command begins again")
            return
        logger.error(
            "the run can go on from step %d: %s (the same command; gapo-mega convert exports its model)",
            step_of(newest),
            newest,
        )

    def _check_finite(self) -> None:
        """Raise ``ValueError`` for weights that nobody can use, before they are saved or exported."""
        if self._engine.is_finite():
            return
        newest = self._checkpoints.latest()
        sound = (
            "there is no sound checkpoint" if newest is None else f"the newest sound checkpoint is {newest}"
        )
        raise ValueError(
            f"stopped: weights are not finite after step {self.step}, neither saved nor exported; {sound}"
        )

    def _is_over(self) -> bool:
        return self.step >= self._work.total_steps or self._selection.stops

    def best_checkpoint(self) -> Path | None:
        """That of the best evaluation, where it is not the policy as it is now."""
        best = self._selection.best
        if best is None or best.step == self.step:
            return None
        return self._checkpoints.path(best.step)

    def _settle(self, seconds: float = math.inf) -> None:
        """Wait for the checkpoint that is being written, so long at most; all ranks call it."""
        if self._saves.under_way is not None:
            with within("checkpoint"):
                self._saves.settle(seconds)

    def _save(self, state: Mapping[str, Any] | None = None) -> None:
        """Write a checkpoint of the current step, or begin to; all ranks call it.

        ``state``: the work's; None: as it is now. Raises ``ValueError`` for weights that are not finite.
        """
        with within("checkpoint"):
            self._write(state)

    def _write(self, state: Mapping[str, Any] | None) -> None:
        self._check_finite()
        extra = {"step": self.step, **(self._work.state_dict() if state is None else state)}
        extra |= self._work.in_flight(self.step)
        if self._unended is not None:
            extra[UNENDED] = self._unended
        about: dict[str, Any] = {UPDATES: self.step * self._work.updates_per_step}
        if self._record is not None:
            about[RECORD] = self._record
        if self._selection.best is not None:
            about[BEST] = asdict(self._selection.best)
        kept = self._selection.kept
        self._saves.save(self.step, extra, about, kept)

    def _set_ends_aside(self) -> None:
        if self._engine.layout.is_main:
            set_aside_ends(self._directory, self.step)

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, if there is one."""
        latest = checkpoint_to_resume(self._checkpoints, self._settings, self._engine)
        if latest is None:
            return
        check_updates(latest, self._work.updates_per_step)
        extra = self._engine.load(latest)
        self._work.load_state_dict(extra, latest)
        self.step = int(extra["step"])
        self._unended = extra.get(UNENDED)
        if not self._selection.kept <= set(self._checkpoints.steps()):
            self._selection.lose(f"{self.best_checkpoint()} is not there")
        logger.info("resumed from %s: %d of %d steps done", latest, self.step, self._work.total_steps)
