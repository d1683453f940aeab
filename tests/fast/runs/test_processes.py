"""Ranks that agree through torch's own store, each a thread with a connection of its own."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from typing import Any

import pytest
import torch.distributed as dist

from gapo_mega.runs.processes import Alone, Job, place_of


class Rank(Job):
    """A rank in a thread: it is given its store, which the environment names in a process."""

    def __init__(self, port: int, rank: int, world: int) -> None:
        self._rank, self._world = rank, world
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20)
        )
        self._rounds = count()
        self.is_main = rank == 0


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def together(store: Any, world: int, work: Callable[[Job], Any]) -> list[Any]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(Rank(store.port, rank, world)), range(world)))


def test_values_come_in_rank_order_round_after_round(store: Any) -> None:
    def work(job: Job) -> list[Any]:
        own = place_of(job)
        return [own, *(job.gather([own[0], number]) for number in range(3))]

    found = together(store, 3, work)
    rounds = [[[rank, number] for rank in range(3)] for number in range(3)]
    assert found == [[(rank, 3), *rounds] for rank in range(3)]


def test_rounds_leave_nothing_in_the_store(store: Any) -> None:
    def work(job: Job) -> int:
        for _ in range(20):
            job.gather("x" * 1000)
        job.leave(None, 5)
        return 0

    before = store.num_keys()
    together(store, 2, work)
    # What is left: the two that left, and what the last rounds' cleaning may not have reached.
    assert store.num_keys() - before <= 2


def test_who_leaves_hears_of_those_who_come_in_time(store: Any) -> None:
    def work(job: Job) -> list[Any]:
        rank, _ = place_of(job)
        if rank == 2:
            return []  # dead
        time.sleep(0.3 * rank)
        return job.leave([7, rank == 0], 1.5)

    first, second, _ = together(store, 3, work)
    assert first == second == [[7, True], [7, False], None]


def test_who_leaves_after_the_others_still_hears_them(store: Any) -> None:
    """The first waits for its seconds only; what it said stays for the one that comes later."""
    done = threading.Event()

    def work(job: Job) -> list[Any]:
        rank, _ = place_of(job)
        if rank == 1:
            assert done.wait(20)
            return job.leave("late", 0.2)
        found = job.leave("early", 0.2)
        done.set()
        return found

    assert together(store, 2, work) == [["early", None], ["early", "late"]]


def test_a_single_process_is_all_there_are() -> None:
    assert place_of(Alone()) == (0, 1) and Alone().leave(3, 0.0) == [3]
