"""What a sweep runs: its warm start and its points, as commands of this package, and their checks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from gapo_mega.config import Config, Section
from gapo_mega.config.loading import load
from gapo_mega.config.supervised import PairsConfig, SftConfig
from gapo_mega.config.sweep import SweepConfig
from gapo_mega.data.preview import preview_supervised
from gapo_mega.files import local
from gapo_mega.planning import methods
from gapo_mega.runs.data_run import DataRun
from gapo_mega.runs.directory import Wanted
from gapo_mega.runs.identity import Identity, settings_of
from gapo_mega.runs.pairs import PairsRun
from gapo_mega.runs.preflight import preview, resolve
from gapo_mega.runs.session import check_before_processes, compare_with_newest
from gapo_mega.runs.start import identity_of, wanted
from gapo_mega.runs.supervised import SftRun
from gapo_mega.runs.sweep_points import (
    WARM_START,
    Point,
    base_file,
    override,
    warm_start_directory,
    warm_start_file,
)
from gapo_mega.runs.sweep_states import State, check_same, state_of, steps_of

LOGS_FOLDER = "logs"


@dataclass(frozen=True)
class Task:
    """One run, as a command line and as what it reads there."""

    name: str
    command: str  # of gapo-mega
    file: Path
    overrides: tuple[str, ...]
    directory: Path
    config: Section

    def state(self) -> State:
        """How far its directory is."""
        return state_of(self.directory, steps_of(self.config))

    def arguments(self, nproc: int | None) -> list[str]:
        """The command line after ``gapo-mega``.

        A part without a checkpoint has nothing to go on from, and its files are replaced: a run that was
        killed while it wrote its results would otherwise pass for one that has ended.
        """
        state = self.state()
        again = ["--overwrite"] if state.begins_anew else []
        processes = [] if nproc is None else ["--nproc", str(nproc)]
        return [self.command, "--config", str(self.file), *processes, *again, *self.overrides]


def point_task(sweep: SweepConfig, file: Path, point: Point) -> Task:
    """The training of ``point``."""
    return Task(point.name, "train", base_file(sweep, file), point.overrides, point.directory, point.config)


def warm_start_task(sweep: SweepConfig, file: Path) -> Task | None:
    """The run that all points start from; None where they start from the base's model."""
    if sweep.warm_start is None:
        return None
    wanted = sweep.warm_start
    directory = warm_start_directory(sweep)
    chosen = {**wanted.settings, "checkpoint.export_hf": True, "output_dir": str(directory)}
    overrides = [override(key, value) for key, value in chosen.items()]
    path = warm_start_file(sweep, file)
    config: Section
    if wanted.command == "train":
        config = methods.load(path, overrides)
    else:
        config = load(path, overrides, kind=SftConfig if wanted.command == "sft" else PairsConfig)
    return Task(WARM_START, wanted.command, path, tuple(overrides), directory, config)


class Checks:
    """The checks that a run makes before anything expensive, for every task of a sweep."""

    def __init__(self, nproc: int | None, warm_start: Task | None) -> None:
        self._processes = nproc or 1
        self._previewed: set[str] = set()
        # Until it has ended, the model that it begins with stands for it: of one shape and tokenizer.
        pending = warm_start is not None and warm_start.state().name != "finished"
        self._stand_in = _model_path(warm_start.config) if warm_start is not None and pending else None

    def check(self, task: Task) -> State:
        """The task's state. Raises ``ValueError`` for what its run would refuse."""
        state = task.state()
        if state.name == "finished":
            check_same(task.directory, task.config)
        elif isinstance(task.config, Config):
            self._check_training(task, task.config, state)
        else:
            self._check_data_run(task, state)
        return state

    def _check_training(self, task: Task, config: Config, state: State) -> None:
        read = config
        if self._stand_in is not None and task.name != WARM_START:
            read = config.model_copy(
                update={"model": config.model.model_copy(update={"path": self._stand_in})}
            )
        _check_directory(task, state, wanted(config), identity_of(resolve(read, self._processes)))
        data = f"{read.data!r} {read.model.path} {sorted(read.columns.items())}"
        if data not in self._previewed:
            preview(read)
            self._previewed.add(data)

    def _check_data_run(self, task: Task, state: State) -> None:
        config = task.config
        assert isinstance(config, SftConfig | PairsConfig)
        kind: type[DataRun[Any, Any]] = SftRun if isinstance(config, SftConfig) else PairsRun
        identity = Identity(kind.command, settings_of(config))
        _check_directory(task, state, kind.wanted(config), identity)
        tokenizer = kind.check(config, self._processes).tokenizer
        preview_supervised(config, lambda: tokenizer)


def _check_directory(task: Task, state: State, wanted: Wanted, identity: Identity) -> None:
    """Raise ``ValueError`` for what a run would refuse in its directory, unless another one is there now."""
    if state.name == "running":
        return
    check_before_processes(task.directory, wanted, state.begins_anew)
    if state.checkpoint:
        compare_with_newest(task.config, identity, task.directory)


def check_all(tasks: Sequence[Task], checks: Checks) -> list[State]:
    """The state of every task. Raises ``ValueError`` with the first one's error, and how many have one."""
    states: list[State] = []
    errors: list[str] = []
    for index, task in enumerate(tasks):
        try:
            states.append(checks.check(task))
        except ValueError as error:
            where = task.name if task.name == WARM_START else f"point {index} ({task.name})"
            errors.append(f"{where}: {error}")
    if errors:
        more = f"; {len(errors) - 1} more like this" if len(errors) > 1 else ""
        raise ValueError(errors[0] + more)
    return states


def log_file(sweep: SweepConfig, name: str) -> Path:
    """Where the output of a task goes."""
    return local(sweep.output_dir) / LOGS_FOLDER / f"{name}.log"


def _model_path(config: Section) -> str:
    assert isinstance(config, Config | SftConfig | PairsConfig)
    return config.model.path
