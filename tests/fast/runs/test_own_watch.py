"""A rank's watch over itself: what counts as getting on, and what ends the process."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest

from gapo_mega import stopping, whereabouts
from gapo_mega.config import ParallelConfig
from gapo_mega.runs import own_watch, processes, watch
from gapo_mega.runs.own_watch import OwnWatch
from gapo_mega.runs.processes import Alone, watched
from gapo_mega.whereabouts import START, enter, get_on, within

LIMIT = timedelta(seconds=1)  # far more than the 0.05 and 0.1 s between looks, on a busy machine too


class Watched:
    """An own watch, and what it ended its process with."""

    def __init__(self, limit: timedelta = LIMIT) -> None:
        self.said: list[str] = []
        self.ended = threading.Event()
        self.watch = OwnWatch(3, limit, self._end)

    def _end(self, message: str) -> None:
        self.said.append(message)
        self.ended.set()


@pytest.fixture(autouse=True)
def _looks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(own_watch, "_FASTEST", 0.05)
    monkeypatch.setattr(stopping, "BETWEEN_LOOKS", 0.1)


@pytest.fixture
def watched_rank() -> Iterator[Watched]:
    found = Watched()
    yield found
    found.watch.stop()


def test_who_does_not_get_on_ends(watched_rank: Watched) -> None:
    enter("score", 7)
    watched_rank.watch.start()
    assert watched_rank.ended.wait(30)
    (said,) = watched_rank.said
    assert said.startswith("rank 3 on ") and "\n" not in said
    assert "has been in step 7, score since " in said
    assert said.endswith(" and has not got on for 1 s (parallel.phase_minutes)")


@pytest.mark.parametrize("kind", ["tokens", "phases", "laps", "waiting for a service"])
def test_who_gets_on_does_not(watched_rank: Watched, kind: str) -> None:
    enter("rollout", 2)
    watched_rank.watch.start()
    end = time.monotonic() + 2 * LIMIT.total_seconds()
    while time.monotonic() < end:
        if kind == "tokens":
            get_on()
        elif kind == "phases":
            with within("score"):
                pass
        elif kind == "laps":
            whereabouts.passed("backward")
        if kind == "waiting for a service":
            stopping.wait(2 * LIMIT.total_seconds())
        else:
            time.sleep(0.05)
    assert not watched_rank.ended.is_set()


def test_what_comes_before_the_run_is_not_limited(watched_rank: Watched) -> None:
    enter(START)
    watched_rank.watch.start()
    assert not watched_rank.ended.wait(2 * LIMIT.total_seconds())


def test_a_process_that_was_stopped_forgives(monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGSTOP and SIGCONT the clock is far on, and no look was taken."""
    enter("score", 1)
    rank = Watched(timedelta(seconds=100))
    clock = iter([0.0, 5.0, 9000.0, 9005.0])
    monkeypatch.setattr(own_watch.time, "monotonic", lambda: next(clock))
    looks = iter([False, False, False, True])
    monkeypatch.setattr(rank.watch._stopping, "wait", lambda _: next(looks))
    rank.watch._watch()
    assert rank.said == []


class EndedError(BaseException):
    pass


def test_a_single_process_is_watched_too(monkeypatch: pytest.MonkeyPatch) -> None:
    ended = threading.Event()
    said: list[str] = []

    def end(message: str) -> None:
        said.append(message)
        ended.set()

    monkeypatch.setattr(processes, "end_process", end)
    enter("score", 2)
    with watched(Alone(), LIMIT, LIMIT):
        assert ended.wait(30)
    assert said[0].endswith("(parallel.phase_minutes); this process ends")
    before = threading.active_count()
    with watched(Alone(), LIMIT, None):
        assert threading.active_count() == before


def test_the_exit_code_is_that_of_lost_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    codes: list[int] = []
    monkeypatch.setattr(os, "_exit", codes.append)
    watch.end_process("rank 0 hangs")
    assert codes == [76]


def test_the_configuration_says_how_long() -> None:
    assert ParallelConfig().phase == timedelta(hours=4)
    assert ParallelConfig(phase_minutes=None).phase is None
    settings: dict[str, Any] = {"phase_minutes": 0.05}
    with pytest.raises(ValueError, match="phase_minutes"):
        ParallelConfig(**settings)


def test_a_rank_may_wait_for_others_as_long_as_they_may_take() -> None:
    for timeout, phase in ((5.0, 5.0), (240.0, 240.0), (600.0, None), (600.0, 601.0)):
        found = ParallelConfig(timeout_minutes=timeout, phase_minutes=phase)
        assert found.phase is None or found.phase >= found.timeout
    for settings, said in (
        ({"phase_minutes": 20}, r"found 20, accepted: at least parallel\.timeout_minutes \(30\), or null"),
        ({"timeout_minutes": 600}, r"found 240, accepted: at least parallel\.timeout_minutes \(600\)"),
    ):
        with pytest.raises(ValueError, match=rf"parallel\.phase_minutes: {said}"):
            ParallelConfig.model_validate(settings)
