"""Runs checks on several ranks, each a process forked from one that has imported Megatron.

Importing costs more than most checks, and torchrun imports on every rank of every launch. The tests of the
commands start torchrun as a user does.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import threading
import time
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore  # type: ignore[attr-defined]

from tests.helpers.environment import SETTINGS
from tests.helpers.ranks.driver import Job, run_rank

TIMEOUT_SECONDS = 900.0
_NEVER_MET = "Gloo connectFullMesh failed"
_starting = threading.Lock()  # launches may be started by several threads


class Launch:
    """Processes that run jobs, one after the other."""

    def __init__(self, ranks: int, jobs: list[Job], folder: Path) -> None:
        """See ``start``."""
        self._ranks, self._folder = ranks, folder
        # Jobs of one layout after the other: they share its process groups.
        self.order = sorted(range(len(jobs)), key=lambda index: _layout(jobs[index][1]))
        self._results_file = folder / f"results{ranks}.jsonl"
        self._results_file.unlink(missing_ok=True)
        # The ranks meet at a store of this process, as torchrun's meet at its agent's.
        self._store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
        arguments = (ranks, self._store.port, [jobs[index] for index in self.order], self._results_file)
        self._processes = [
            _server().Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()
        self._waiting = list(self._processes)

    def results(self) -> list[dict[str, Any]]:
        """Rank 0's results so far, in the order in which the jobs run: ``order``."""
        if not self._results_file.exists():
            return []
        lines = self._results_file.read_text().splitlines(keepends=True)
        return [json.loads(line) for line in lines if line.endswith("\n")]  # the last may be half written

    def runs(self, seconds: float) -> bool:
        """Whether processes still run after waiting for so long; one that fails ends the others."""
        deadline = time.monotonic() + seconds
        while self._waiting:
            left = max(0.0, deadline - time.monotonic())
            ended = connection.wait([p.sentinel for p in self._waiting], left)
            if not ended:
                return True
            self._waiting = [p for p in self._waiting if p.sentinel not in ended]
            for process in self._processes:
                process.join(0)
            if any(p.exitcode for p in self._processes if p not in self._waiting):
                self.stop()
        return False

    def stop(self) -> None:
        """End what runs."""
        for process in self._waiting:
            process.kill()
            process.join()
        self._waiting = []

    def report(self) -> str:
        """Exit codes, and the end of what the ranks printed."""
        logs = sorted(self._folder.glob(f"rank*of{self._ranks}.log"))
        text = "\n".join(path.read_text()[-6000:] for path in logs)
        return f"{self._ranks} ranks: exit codes {[p.exitcode for p in self._processes]}\n{text}"


def start(ranks: int, jobs: list[Job], folder: Path) -> Launch:
    """Start ``jobs`` on ``ranks`` processes; ``folder`` takes what they print and their results."""
    with _starting:
        return Launch(ranks, jobs, folder)


def launch(ranks: int, jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """Rank 0's results of ``jobs`` on ``ranks`` processes; ``folder`` takes what they print.

    Gloo's connections between new processes failed once in some thousand launches; then no job has begun,
    and the ranks meet once more.
    """
    running = _ended(start(ranks, jobs, folder))
    if not running.results() and _NEVER_MET in running.report():
        running = _ended(start(ranks, jobs, folder))
    results = running.results()
    if len(results) < len(jobs):
        raise AssertionError(running.report())
    return [
        result for _, result in sorted(zip(running.order, results, strict=True), key=lambda pair: pair[0])
    ]


def _ended(running: Launch) -> Launch:
    if running.runs(TIMEOUT_SECONDS):
        running.stop()
    return running


def result(results: dict[str, dict[str, Any]], name: str) -> dict[str, Any]:
    """What the job ``name`` found; fails with its error if it has one."""
    assert "error" not in results[name], results[name]["error"]
    found: dict[str, Any] = results[name]["result"]
    return found


@functools.cache
def _server() -> ForkServerContext:
    """One for the whole test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.helpers.ranks.driver"])
    with mock.patch.dict(os.environ, SETTINGS):
        forkserver.ensure_running()
    return context


def _layout(arguments: dict[str, Any]) -> tuple[int, ...]:
    layout = arguments.get("layout", {})
    return tuple(layout.get(name, 1) for name in ("tensor", "pipeline", "expert", "expert_tensor", "context"))
