"""What the ranks of a job tell one another through torch's own store.

Several ranks are threads with a connection each; what torchrun's agent keeps is a job of one.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from gapo_mega.planning import meeting
from gapo_mega.runs.processes import (
    Alone,
    Job,
    has_begun,
    naming_the_lost,
    note_begun,
    watched,
)
from gapo_mega.whereabouts import LostPeersError, enter

SILENCE = timedelta(minutes=1)


@pytest.fixture(autouse=True)
def kept(monkeypatch: pytest.MonkeyPatch) -> dist.TCPStore:
    """The store of torchrun's agent, which outlives the workers."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    monkeypatch.setattr(meeting, "_met", {})
    monkeypatch.setattr(meeting, "_connect", lambda *_: dist.TCPStore("127.0.0.1", store.port))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    monkeypatch.delenv("TORCHELASTIC_RESTART_COUNT", raising=False)
    return store


def next_attempt() -> Job:
    """As in the process that torchrun starts after a failure."""
    meeting._met.clear()
    return Job(timedelta(seconds=20))


def test_what_an_earlier_attempt_began_is_known_whoever_counts_the_restart(tmp_path: Path) -> None:
    first = next_attempt()
    assert not has_begun(first, tmp_path)
    assert not has_begun(next_attempt(), tmp_path), "it had not come that far"
    note_begun(first, tmp_path)
    later = next_attempt()
    assert has_begun(later, tmp_path) and not has_begun(later, tmp_path / "other")


def test_a_counted_restart_is_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert has_begun(next_attempt(), tmp_path) and has_begun(Alone(), tmp_path)


def test_who_does_not_answer_before_there_are_groups_is_named() -> None:
    job = next_attempt()
    job._patience = timedelta(seconds=0.5)
    enter("checks")
    with pytest.raises(LostPeersError, match=r"^rank 0 waited for rank 3 in checks, at most 0\.0"):
        job._read("nothing", 3)


@pytest.mark.parametrize(
    "words",
    [
        "[../gloo/transport/tcp/pair.cc:553] Connection closed by peer [127.0.0.1]:163. This is typical",
        "[/pytorch/third_party/gloo/gloo/transport/tcp/unbound_buffer.cc:78] Timed out waiting 3000ms",
        "Application timeout caused pair closure",
    ],
)
def test_errors_of_collectives_name_rank_step_and_phase(words: str) -> None:
    """The texts are gloo's; its errors have no type of their own."""
    enter("score", 3)
    expected = pytest.raises(LostPeersError, match=r"rank 0 .*step 3, score")
    with expected as caught, watched(next_attempt(), SILENCE):
        raise RuntimeError(words)
    assert "\n" not in str(caught.value) and words[:30] in str(caught.value)


@pytest.mark.parametrize("error", [ValueError("gloo"), RuntimeError("the reward failed"), KeyError("x")])
def test_other_errors_stay_what_they_are(error: Exception) -> None:
    with pytest.raises(type(error)) as caught, watched(next_attempt(), SILENCE):
        raise error
    assert caught.value is error
    alone = RuntimeError("Connection closed by peer")
    with pytest.raises(RuntimeError) as caught, naming_the_lost(Alone()):
        raise alone
    assert caught.value is alone


def test_the_others_hear_of_an_error_and_not_of_a_good_end() -> None:
    job = next_attempt()
    with watched(job, SILENCE):
        pass
    assert not job._store.check(["lost"])
    enter("score", 2)
    with pytest.raises(KeyError), watched(job, SILENCE):
        raise KeyError("a column")
    said = job._store.get("lost").decode()
    assert said.startswith("rank 0 on ") and said.endswith("failed in step 2, score: KeyError: 'a column'")


class Rank(Job):
    """A rank in a thread: it is given its store, which the environment names in a process."""

    def __init__(self, port: int, rank: int, world: int) -> None:
        self.rank, self.size = rank, world
        self._store = dist.TCPStore(  # type: ignore[attr-defined]
            "127.0.0.1", port, is_master=False, timeout=timedelta(seconds=20)
        )
        self._rounds = count()
        self._patience = timedelta(seconds=20)
        self._watch = None
        self.is_main = rank == 0


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # type: ignore[attr-defined]


def together(store: Any, world: int, work: Callable[[Job], Any]) -> list[Any]:
    with ThreadPoolExecutor(world) as pool:
        return list(pool.map(lambda rank: work(Rank(store.port, rank, world)), range(world)))


def test_values_come_in_rank_order_round_after_round(store: Any) -> None:
    def work(job: Job) -> list[Any]:
        own = job.rank, job.size
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
        rank = job.rank
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
        rank = job.rank
        if rank == 1:
            assert done.wait(20)
            return job.leave("late", 0.2)
        found = job.leave("early", 0.2)
        done.set()
        return found

    assert together(store, 2, work) == [["early", None], ["early", "late"]]


def test_a_single_process_is_all_there_are() -> None:
    assert (Alone().rank, Alone().size) == (0, 1) and Alone().leave(3, 0.0) == [3]
