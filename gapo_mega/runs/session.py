"""One run's hold on its output directory: takes it, says what it may go on from, writes down what it is.

Everything that can be refused is refused before models load, on every rank alike.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Collection, Mapping
from contextlib import AbstractContextManager, ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any

from gapo_mega.config import Config, Section
from gapo_mega.config.supervised import SupervisedConfig
from gapo_mega.data.token_cache import TokenCache, cache_directory
from gapo_mega.planning.disk import DiskPlan
from gapo_mega.runs.checkpoints import (
    CHECKPOINTS_FOLDER,
    RECORD,
    RUN_ID,
    check_updates,
    checkpoint_path,
    complete_steps,
    is_due,
    marker_of,
    set_aside,
)
from gapo_mega.runs.directory import Wanted, begin, check_directory, end, read_manifest
from gapo_mega.runs.disk_space import bytes_below, check_plan
from gapo_mega.runs.identity import TOTAL_UPDATES, Identity, rules_of
from gapo_mega.runs.leftovers import remove_leftovers, remove_temporary
from gapo_mega.runs.lock import DirectoryLock, check_free, disk_errors, token_in
from gapo_mega.runs.processes import Peers, agree, has_begun, is_first_here, note_begun, peers, watched
from gapo_mega.runs.recorded_config import record_config
from gapo_mega.runs.resume import (
    Comparison,
    changes_of_schedule,
    compare_contents,
    compare_settings,
    parameter_of,
    told,
)
from gapo_mega.runs.sound_checkpoints import Examined, examine
from gapo_mega.runs.uploads import Export

logger = logging.getLogger(__name__)

VISIBLE_WITHIN = 10.0  # seconds until another host sees a new file


def check_before_processes(directory: Path, wanted: Wanted, overwrite: bool) -> None:
    """What one process can refuse for those that it will start. Raises ``ValueError``, changes nothing."""
    check_directory(directory, wanted, overwrite)
    check_free(directory)


def compare_with_newest(
    config: Section, identity: Identity, directory: Path, damaged: Collection[str] = ()
) -> tuple[Comparison, list[dict[str, Any]]]:
    """Settings against the newest checkpoint in ``directory``, and where earlier processes changed them.

    ``damaged``: names of checkpoints that do not count. Raises ``ValueError`` for another command and for
    settings that may not change.
    """
    steps = sound_steps(directory, damaged)
    if not steps:
        return Comparison(), []
    where = checkpoint_path(directory / CHECKPOINTS_FOLDER, steps[-1])
    record = record_of(where)
    manifest = read_manifest(directory)
    if manifest is not None and manifest.run is not None and record.get(RUN_ID, manifest.run) != manifest.run:
        raise ValueError(
            f"output_dir: found {where}, a checkpoint of another run than this directory's; accepted: to "
            "move it away, or another output_dir"
        )
    command = record.get("command", identity.command)
    if command != identity.command:
        raise ValueError(
            f"output_dir: found {where}, which {command} has written; accepted for {identity.command}: "
            "another output_dir, or --overwrite"
        )
    settings = record.get("settings", {})
    if not settings:
        return Comparison(unchecked=list(identity.settings)), []
    found = compare_settings(settings, identity.settings, rules_of(config), str(where))
    found.raise_refused()
    return found, list(record.get("history", []))


def sound_steps(directory: Path, damaged: Collection[str]) -> list[int]:
    """The steps of the complete checkpoints of the run in ``directory``, ascending, without ``damaged``."""
    folder = directory / CHECKPOINTS_FOLDER
    return [step for step in complete_steps(folder) if checkpoint_path(folder, step).name not in damaged]


def record_of(checkpoint: Path) -> dict[str, Any]:
    """What ``checkpoint`` says that it belongs to; empty for one of a version without a record."""
    found = marker_of(checkpoint).get(RECORD)
    return found if isinstance(found, dict) else {}


class Session:
    """Holds the output directory of a run from ``open`` to ``close``. Every rank has one, and calls alike."""

    def __init__(
        self,
        config: Config | SupervisedConfig,
        directory: Path,
        wanted: Wanted,
        overwrite: bool,
        everyone: Peers | None = None,
    ) -> None:
        self.config = config
        self.directory = directory.absolute()
        self.history: list[dict[str, Any]] = []  # where earlier processes, and this one, changed settings
        self._wanted = wanted
        self._overwrite = overwrite
        self.everyone = peers(config.parallel.timeout) if everyone is None else everyone
        self._watched = ExitStack()
        self._is_open = False
        self._lock = DirectoryLock(self.directory, wanted.command)
        self._identity: Identity | None = None
        self._compared = Comparison()
        self._examined = Examined()
        self.export: Export | None = None  # where the exported model goes, beside this directory
        self._run_id = ""  # of rank 0, from ``begin`` on

    # -- the directory -------------------------------------------------------------------------------
    def open(self) -> None:
        """Take the directory on every rank, and look at its checkpoints. Changes none of what is there.

        From here on ranks watch over one another. Raises ``ValueError`` where the directory is not to be had,
        and where no checkpoint is sound.
        """
        self._watched.enter_context(self._watches())
        self._is_open = True
        try:
            # Workers that torchrun starts again go on; they do not begin once more.
            self._overwrite = self._overwrite and not has_begun(self.everyone, self.directory)
            agree(self.everyone, self._take)
            agree(self.everyone, self._see_one_directory)
            if not self._overwrite:
                self._examined = examine(self.directory / CHECKPOINTS_FOLDER, self.everyone)
        except BaseException as error:
            self.__exit__(type(error), error, error.__traceback__)
            raise

    def _watches(self) -> AbstractContextManager[None]:
        parallel = self.config.parallel
        return watched(self.everyone, parallel.silence, parallel.phase)

    def close(self) -> None:
        """Give it back."""
        self.__exit__(None, None, None)

    def __enter__(self) -> Session:
        """As ``open``, unless it is open."""
        if not self._is_open:
            self.open()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._lock.release()
        self._is_open = False
        self._watched.__exit__(kind, error, trace)

    def _take(self) -> None:
        check_directory(self.directory, self._wanted, self._overwrite)
        if self.everyone.is_main:
            self._lock.acquire()
            check_directory(self.directory, self._wanted, self._overwrite)  # it may have changed meanwhile

    def _see_one_directory(self) -> None:
        where, token = self.everyone.gather([str(self.directory), self._lock.token])[0]
        patience = time.monotonic() + VISIBLE_WITHIN
        while (found := token_in(self.directory)) != token and time.monotonic() < patience:
            time.sleep(0.1)
        if found != token:
            raise ValueError(
                f"output_dir: rank 0 writes to {where}, which another rank does not see at {self.directory}; "
                "accepted: a directory that all nodes share, by the same path or an absolute one"
            )

    # -- what it reads -------------------------------------------------------------------------------
    def token_cache(self, progress: bool) -> TokenCache:
        """Where the ranks look up and share out tokenised rows; ``progress``: the main one shows a bar."""
        ranks = self.everyone
        shown = progress and ranks.is_main
        return TokenCache(cache_directory(), ranks.rank, ranks.size, ranks.gather, progress=shown)

    # -- what it goes on from ------------------------------------------------------------------------
    def check_settings(self, identity: Identity) -> None:
        """Refuse settings that the newest checkpoint has otherwise. ``identity`` lacks its contents yet.

        Raises ``ValueError`` naming setting and values.
        """
        self._identity = identity
        agree(self.everyone, self._compare_settings)

    def check_contents(self, contents: Mapping[str, Any], steps: int, total_updates: int) -> None:
        """Refuse data and models that are not those of the newest checkpoint, or that ranks see otherwise.

        Args:
            contents: fingerprints, by what they are of.
            steps, total_updates: of the whole run.
        """
        assert self._identity is not None, "check_settings comes first"
        self._identity.settings[TOTAL_UPDATES] = total_updates
        self._identity.contents.update(contents)
        settings = self._identity.settings
        everyone = self.everyone.gather(dict(contents))

        def check() -> None:
            for other in everyone:
                for key, value in other.items():
                    if value != everyone[0][key]:
                        raise ValueError(
                            f"{parameter_of(key, settings)}: ranks read different {key} "
                            f"({everyone[0][key]}, {value}); accepted: files that are the same on all nodes"
                        )
            self._compare_contents()
            self._compare_counts(total_updates // steps)

        agree(self.everyone, check)
        self._tell_fewer(steps)

    def _tell_fewer(self, steps: int) -> None:
        newest = self._newest
        if self.everyone.is_main and newest and steps < newest[-1]:
            logger.warning(
                "the run has done %d steps and %d are asked for: nothing more is trained, and nothing of "
                "what it has done is removed",
                newest[-1],
                steps,
            )

    @property
    def _newest(self) -> list[int]:
        return [] if self._overwrite else sound_steps(self.directory, self._examined.damaged)

    @property
    def _newest_path(self) -> Path:
        return checkpoint_path(self.directory / CHECKPOINTS_FOLDER, self._newest[-1])

    @property
    def _resumed_run(self) -> str | None:
        """By what the checkpoint that the run goes on from is known."""
        return record_of(self._newest_path).get(RUN_ID) if self._newest else None

    def _compare_settings(self) -> None:
        assert self._identity is not None
        if self._newest:
            self._compared, self.history = compare_with_newest(
                self.config, self._identity, self.directory, self._examined.damaged
            )

    def _compare_contents(self) -> None:
        assert self._identity is not None
        if not self._newest:
            return
        record = record_of(self._newest_path)
        found = compare_contents(
            record.get("contents", {}),
            self._identity.contents,
            self._compared.changed,
            self._identity.settings,
            rules_of(self.config),
            str(self._newest_path),
        )
        found.raise_refused()
        self._compared.unchecked += found.unchecked
        total, mine = record.get("settings", {}).get(TOTAL_UPDATES), self._identity.settings[TOTAL_UPDATES]
        if total not in (None, mine):
            self._compared.changed[TOTAL_UPDATES] = (total, mine)

    def _compare_counts(self, updates_per_step: int) -> None:
        if self._newest:
            check_updates(self._newest_path, updates_per_step)

    def check_space(self, plan: DiskPlan) -> None:
        """Refuse a disk without room for what the run will write. Raises ``ValueError`` on every rank."""

        def check() -> None:
            if self.everyone.is_main:
                check_plan(self.directory, plan, bytes_below(self.directory / CHECKPOINTS_FOLDER))

        agree(self.everyone, check)

    def check_export(self) -> None:
        """Refuse a place for the exported model that cannot be written to. Raises ``ValueError``.

        Says so where a run that is killed at the end would leave nothing to try again from.
        """
        url = self.config.checkpoint.export_to
        if url is None:
            return
        manifest = read_manifest(self.directory)
        known = [self._resumed_run, *([] if manifest is None else [manifest.run, *manifest.replaced])]
        self.export = export = Export(url, [run for run in known if run is not None])
        agree(self.everyone, lambda: export.check(self.directory) if self.everyone.is_main else None)
        if self.everyone.is_main and not is_due(self.config.checkpoint, 0, last=True):
            logger.warning(
                "checkpoint.export_to: found with checkpoint.every_steps 0 and save_final false: where this "
                "run is killed while its model is put there, hf/ is whole, but no command tries again; "
                "checkpoint.save_final=true keeps a checkpoint for that"
            )

    # -- what it writes ------------------------------------------------------------------------------
    def begin(self) -> None:
        """Write manifest and configuration, and log what the checkpoint has otherwise. Before models load.

        From here on the run is accepted, and so damaged checkpoints are renamed.
        """
        newest = self._newest
        known_by = self._resumed_run

        def write() -> None:
            if not self.everyone.is_main:
                return
            with disk_errors(self.directory):
                self._set_damaged_aside()
                if read_manifest(self.directory) is not None:
                    remove_leftovers(self.directory)
                self._run_id = begin(self.directory, self._wanted, self._overwrite, known_by)
                record_config(self.config, self.directory)

        if is_first_here():
            remove_temporary()
        agree(self.everyone, write)
        self._run_id = self.everyone.gather(self._run_id)[0]
        if self.export is not None:
            self.export.known_by.insert(0, self._run_id)
        self._see_none_damaged()
        note_begun(self.everyone, self.directory)
        if newest:
            self._note_changes(newest[-1])

    def _set_damaged_aside(self) -> None:
        for name, reason in self._examined.damaged.items():
            path = self.directory / CHECKPOINTS_FOLDER / name
            logger.warning(
                "checkpoint %s is damaged: %s; it is now %s, and the run goes on from %s",
                path, reason, set_aside(path).name, self._examined.sound,
            )  # fmt: skip

    def _see_none_damaged(self) -> None:
        """Wait until this host sees the new names: file systems that are shared remember old ones."""
        patience = time.monotonic() + VISIBLE_WITHIN
        damaged = [self.directory / CHECKPOINTS_FOLDER / name for name in self._examined.damaged]
        while any(path.exists() for path in damaged) and time.monotonic() < patience:
            time.sleep(0.1)

    def record(self) -> dict[str, Any]:
        """What every checkpoint of this run says that it belongs to."""
        assert self._identity is not None
        return {RUN_ID: self._run_id, **self._identity.as_dict(), "history": self.history}

    def end(self, steps: int, asked: int | None = None) -> None:
        """Write down that the run has reached its end after ``steps`` of those that it was ``asked`` for."""
        if self.everyone.is_main:
            end(self.directory, steps, asked)

    def _note_changes(self, step: int) -> None:
        assert self._identity is not None
        changed, unchecked = self._compared.changed, self._compared.unchecked
        if changed:
            pairs = {key: list(values) for key, values in changed.items()}
            self.history.append({"step": step, "changed": pairs})
        if not self.everyone.is_main:
            return
        if changed:
            logger.warning("from step %d on with other settings: %s", step, told(changed))
        for sentence in changes_of_schedule(changed, self._identity, TOTAL_UPDATES):
            logger.warning("%s", sentence)
        if unchecked:
            logger.warning(
                "the checkpoint of step %d, of another version, says nothing of these settings, which cannot "
                "be checked: %s",
                step, ", ".join(unchecked),
            )  # fmt: skip
