"""How far a run's directory is, as its files and its lock tell; and whether it is the run that is wanted."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from gapo_mega.config import Config, Section
from gapo_mega.config.loading import load
from gapo_mega.config.results import without_effect
from gapo_mega.evaluation.files import config_file
from gapo_mega.evaluation.series import METRICS_FILE
from gapo_mega.evaluation.summary import SUMMARY_FILE
from gapo_mega.runs.checkpoints import CHECKPOINTS_FOLDER, complete_steps
from gapo_mega.runs.directory import EXPORT_FOLDER, read_manifest
from gapo_mega.runs.identity import settings_of
from gapo_mega.runs.lock import check_free

StateName = Literal["new", "part", "running", "finished", "failed"]


@dataclass(frozen=True)
class State:
    """Of one run's directory."""

    name: StateName
    steps: int  # that its log, or its newest checkpoint, holds
    checkpoint: bool = False  # whether there is one to go on from

    @property
    def begins_anew(self) -> bool:
        """Whether a run left a part, and no checkpoint to go on from."""
        return self.name == "part" and not self.checkpoint


def state_of(directory: Path, steps: int | None) -> State:
    """The state of the run of ``steps`` in ``directory``; None: however many it takes.

    A run whose process was killed is ``part``; nobody but a sweep knows that one has ``failed``. Raises
    ``ValueError`` for a directory that no run has written.
    """
    there = complete_steps(directory / CHECKPOINTS_FOLDER)
    done = lines_in(directory / METRICS_FILE)
    if is_in_use(directory):
        return State("running", done, bool(there))
    manifest = read_manifest(directory)
    if manifest is None:
        return State("new", 0)
    results = [directory / name for name in (SUMMARY_FILE, EXPORT_FOLDER)]
    finished = manifest.finished
    if finished is not None and any(path.exists() for path in results):
        # With a checkpoint of its last step a run can go on to more steps; without one it stays as it is.
        # One that stopped early has been asked for these steps already.
        asked = max(finished, manifest.asked or 0)
        goes_on = steps is not None and steps > asked and there and there[-1] >= finished
        if not goes_on:
            return State("finished", finished, bool(there))
    return State("part", there[-1] if there else 0, bool(there))


def is_in_use(directory: Path) -> bool:
    """Whether a process of this host holds ``directory``."""
    try:
        check_free(directory)
    except ValueError:
        return True
    return False


def lines_in(path: Path) -> int:
    """Complete lines of a file, 0 where there is none."""
    try:
        return path.read_bytes().count(b"\n")
    except FileNotFoundError:
        return 0


def check_same(directory: Path, wanted: Section) -> None:
    """Raise ``ValueError`` where the finished run in ``directory`` was one of other settings."""
    recorded = load(config_file(directory), kind=type(wanted))
    before, now = settings_of(recorded), settings_of(wanted)
    best = before.get("checkpoint.best") or now.get("checkpoint.best")
    any_value = ("output_dir", *without_effect(best))
    for key in sorted({*before, *now}):
        if before.get(key) != now.get(key) and not key.startswith(any_value):
            raise ValueError(
                f"{key}: found {now.get(key)!r}, but the run that has ended in {directory} had "
                f"{before.get(key)!r}; accepted: that value, another output_dir, or to remove that directory"
            )


def steps_of(config: Section) -> int | None:
    """Steps of a training; None for what the data decide."""
    return config.steps if isinstance(config, Config) else None
