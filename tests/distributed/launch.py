"""Runs checks on several ranks, each a process forked from one that has imported Megatron.

Importing costs more than most checks, and torchrun imports on every rank of every launch. The tests of the
commands start torchrun as a user does.
"""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
from multiprocessing import connection, forkserver
from multiprocessing.context import ForkServerContext, ForkServerProcess
from pathlib import Path
from typing import Any
from unittest import mock

from torch.distributed import TCPStore

from tests.distributed.driver import Job, run_rank
from tests.environment import SETTINGS

TIMEOUT_SECONDS = 900.0


def launch(ranks: int, jobs: list[Job], folder: Path) -> list[dict[str, Any]]:
    """Rank 0's results of ``jobs`` on ``ranks`` processes; ``folder`` takes what they print."""
    # Jobs of one layout after the other: they share its process groups.
    order = sorted(range(len(jobs)), key=lambda index: _layout(jobs[index][1]))
    results_file = folder / f"results{ranks}.json"
    results_file.unlink(missing_ok=True)
    # The ranks meet at a store of this process, as torchrun's meet at its agent's.
    store = TCPStore("localhost", 0, is_master=True, wait_for_workers=False)
    arguments = (ranks, store.port, [jobs[index] for index in order], results_file)
    processes = [_server().Process(target=run_rank, args=(rank, *arguments)) for rank in range(ranks)]
    for process in processes:
        process.start()
    _wait(processes)
    if not results_file.exists():
        logs = "\n".join(path.read_text()[-6000:] for path in sorted(folder.glob(f"rank*of{ranks}.log")))
        raise AssertionError(f"{ranks} ranks: exit codes {[p.exitcode for p in processes]}\n{logs}")
    results: list[dict[str, Any]] = json.loads(results_file.read_text())
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


@functools.cache
def _server() -> ForkServerContext:
    """One for the whole test process."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["tests.distributed.driver"])
    with mock.patch.dict(os.environ, SETTINGS):
        forkserver.ensure_running()
    return context


def _wait(processes: list[ForkServerProcess]) -> None:
    """Until all have ended; one that fails, or the time limit, ends the others."""
    waiting = list(processes)
    while waiting:
        ended = connection.wait([p.sentinel for p in waiting], TIMEOUT_SECONDS)
        waiting = [p for p in waiting if p.sentinel not in ended]
        for process in processes:
            process.join(0)
        if not ended or any(p.exitcode for p in processes if p not in waiting):
            for process in waiting:
                process.kill()
                process.join()
            return


def _layout(arguments: dict[str, Any]) -> tuple[int, int]:
    layout = arguments.get("layout", {})
    return layout.get("tensor", 1), layout.get("pipeline", 1)
