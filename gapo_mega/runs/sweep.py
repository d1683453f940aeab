"""Runs a sweep: every point a process of its own, several at once, to the end or to a signal.

A point that fails or is killed hurts no other. What has ended stays; the same command goes on with the rest,
and waits for a point that another process still holds.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import IO, Any

import torch
from tqdm import tqdm

from gapo_mega.config import Config
from gapo_mega.evaluation.series import METRICS_FILE
from gapo_mega.runs.lock import disk_errors
from gapo_mega.runs.sweep_states import StateName, is_in_use, lines_in
from gapo_mega.runs.sweep_tasks import Task

_BETWEEN_LOOKS = 0.5  # seconds
_LOOKS_AT_LOGS = 4  # every so many looks


@dataclass(frozen=True)
class Room:
    """What runs at once may use."""

    jobs: int
    nproc: int | None  # processes of one run
    threads: int  # of every process
    devices: Sequence[str] = ()  # GPUs, by the names of CUDA_VISIBLE_DEVICES

    def environment(self, slot: int) -> dict[str, str]:
        """Variables of the run in ``slot``, from 0: its threads, and its own GPUs where there are enough."""
        found = {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", str(self.threads))}
        each = self.nproc or 1
        if len(self.devices) >= each:
            first = slot * each % (len(self.devices) // each * each)
            found["CUDA_VISIBLE_DEVICES"] = ",".join(self.devices[first : first + each])
        return found


def room(jobs: int | None, nproc: int | None, cores: int) -> Room:
    """As many runs of ``nproc`` processes as ``jobs``, or as GPUs, or else ``cores``, have room for."""
    each = nproc or 1
    devices = _devices()
    count = jobs or max(1, (len(devices) or cores) // each)
    return Room(count, nproc, max(1, cores // (count * each)), devices)


@dataclass
class Pool:
    """Runs tasks.

    ``log_file``: where a task's output goes, by its name. ``ended``: called with a task that has finished,
    unless ``states`` had it so from the first.
    """

    room: Room
    log_file: Callable[[str], Path]
    ended: Callable[[Task], None]
    states: dict[str, StateName] = field(default_factory=dict)  # by name of the task
    stopped: bool = False
    _running: dict[str, _Running] = field(default_factory=dict)

    def run(self, tasks: Sequence[Task]) -> None:
        """Run ``tasks`` to their ends; after SIGTERM or SIGINT stop them, and return with ``stopped``."""
        waiting = deque(tasks)
        looks = 0
        bar: tqdm[Any] = tqdm(
            total=_total(tasks), unit="step", desc="sweep", dynamic_ncols=True, disable=None
        )
        with bar, self._stopping():
            while self._running or (waiting and not self.stopped):
                while waiting and len(self._running) < self.room.jobs and not self.stopped:
                    self._begin(waiting.popleft())
                self._look(waiting)
                if looks % _LOOKS_AT_LOGS == 0 or not self._running:
                    self._show(bar, tasks)
                looks += 1
                if self._running:
                    time.sleep(_BETWEEN_LOOKS)

    def _begin(self, task: Task) -> None:
        state = task.state()
        if state.name == "finished":
            self._end(task, "finished")
        elif state.name == "running":
            tqdm.write(f"{task.name}: another process has it; waiting for that one to end")
            self._running[task.name] = _Running(task, self._free_slot(), None)
            self.states[task.name] = "running"
        else:
            self._start(task)

    def _start(self, task: Task) -> None:
        slot = self._free_slot()
        log = self.log_file(task.name)
        with disk_errors(log.parent):
            log.parent.mkdir(parents=True, exist_ok=True)
            file = log.open("ab")
        tether = [sys.executable, "-m", "gapo_mega.runs.tethered", str(os.getpid())]
        process = subprocess.Popen(
            [*tether, *task.arguments(self.room.nproc)],
            env={**os.environ, **self.room.environment(slot)},
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            start_new_session=True,  # a terminal's Ctrl-C reaches it through this process alone
        )
        self._running[task.name] = _Running(task, slot, process, file)
        self.states[task.name] = "running"

    def _look(self, waiting: deque[Task]) -> None:
        for running in list(self._running.values()):
            if not running.has_ended():
                continue
            del self._running[running.task.name]
            task, state = running.task, running.task.state().name
            if state == "finished":
                self._end(task, "finished")
            elif running.process is None and not self.stopped:
                waiting.appendleft(task)  # whoever had it left it half done
            elif self.stopped:
                self._end(task, state)
            else:
                self._end(task, "failed")

    def _end(self, task: Task, state: StateName) -> None:
        before, self.states[task.name] = self.states.get(task.name), state
        if state == "finished":
            if before != "finished":
                self.ended(task)
            tqdm.write(f"{task.name}: finished")
        elif state == "failed":
            log = self.log_file(task.name)
            tqdm.write(f"{task.name}: failed: {last_line(log)} (all of it: {log})")

    def _free_slot(self) -> int:
        taken = {running.slot for running in self._running.values()}
        return next(slot for slot in range(len(taken) + 1) if slot not in taken)

    def _show(self, bar: tqdm[Any], tasks: Sequence[Task]) -> None:
        names = list(self.states.values())
        count = {state: names.count(state) for state in ("finished", "running", "failed")}
        shown = [f"{number} {state}" for state, number in count.items() if number]
        bar.set_postfix_str(", ".join(shown), refresh=False)
        bar.update(sum(lines_in(task.directory / METRICS_FILE) for task in tasks) - bar.n)

    @contextmanager
    def _stopping(self) -> Iterator[None]:
        """Within: a signal is handed on to the runs, which write checkpoints."""

        def stop(number: int, frame: FrameType | None) -> None:
            self.stopped = True
            for running in self._running.values():
                if running.process is not None:
                    running.process.send_signal(signal.SIGTERM)
                else:
                    running.left = True

        before: Mapping[int, object] = {
            number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)
        }
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)  # type: ignore[arg-type]


@dataclass
class _Running:
    task: Task
    slot: int
    process: subprocess.Popen[bytes] | None  # None: of somebody else
    log: IO[bytes] | None = None
    left: bool = False  # somebody else's, no longer waited for

    def has_ended(self) -> bool:
        if self.process is None:
            return self.left or not is_in_use(self.task.directory)
        if self.process.poll() is None:
            return False
        assert self.log is not None
        self.log.close()
        return True


def last_line(log: Path) -> str:
    """The last line of a log that says something, for people."""
    with log.open("rb") as file:
        file.seek(max(0, os.fstat(file.fileno()).st_size - 20_000))
        lines = [line.strip() for line in file.read().decode("utf-8", "replace").splitlines()]
    said = [line for line in lines if line]
    errors = [line for line in said if line.startswith("error: ") or "Error: " in line]
    return (errors or said or ["it wrote nothing"])[-1][:300]


def _total(tasks: Sequence[Task]) -> int | None:
    """Optimizer steps of all trainings."""
    found = 0
    for task in tasks:
        if not isinstance(task.config, Config):
            return None
        algorithm = task.config.algorithm
        found += task.config.steps * algorithm.ppo_epochs * algorithm.minibatches
    return found


def _devices() -> list[str]:
    count = torch.cuda.device_count()
    visible = [name.strip() for name in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",") if name.strip()]
    return visible[:count] if visible else [str(index) for index in range(count)]
