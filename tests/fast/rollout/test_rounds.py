"""Ranks that wait for longer than any collective may take."""

from __future__ import annotations

import logging
import time
from datetime import timedelta
from itertools import islice

import pytest

from gapo_mega.rollout import rounds
from gapo_mega.rollout.rounds import gathered, pauses, still_waits, wait_for_all
from tests.helpers.team import Member, Team

LIMIT = timedelta(seconds=1.5)  # of a team's wait for one another, in the place of half an hour
PAUSE = 0.3  # seconds before each round, far below the limit on a busy machine too
LONG = 2.5  # seconds


@pytest.fixture
def _short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(rounds, "_FIRST", PAUSE)
    monkeypatch.setattr(rounds, "_FURTHER", PAUSE)


def test_pauses_are_far_below_the_limit_of_a_collective() -> None:
    assert list(islice(pauses(timedelta(minutes=30)), 3)) == [30, 60, 60]
    assert list(islice(pauses(timedelta(seconds=6)), 3)) == [2, 2, 2]


@pytest.mark.usefixtures("_short_pauses")
def test_replicas_wait_for_the_slowest(caplog: pytest.LogCaptureFixture) -> None:
    def work(member: Member) -> list[int]:
        end = time.monotonic() + LONG * member.layout.data_rank
        for seconds in pauses(LIMIT):
            if time.monotonic() > end:
                break
            time.sleep(seconds)
            still_waits(member, f"replica {member.layout.data_rank} waits")
        return gathered(member, member.layout.data_rank)

    with caplog.at_level(logging.INFO):
        assert Team(4, 2, LIMIT.total_seconds()).run(work) == [[0, 1]] * 4
    assert {record.getMessage() for record in caplog.records} == {"replica 1 waits"}


@pytest.mark.usefixtures("_short_pauses")
def test_all_wait_until_the_first_rank_of_every_replica_has_what_it_waits_for() -> None:
    done: list[int] = []

    def work(member: Member) -> list[int]:
        end = time.monotonic() + LONG * member.layout.data_rank

        def wait(seconds: float) -> bool:
            if not member.layout.is_first_of_replica:
                return False  # nobody asks it
            time.sleep(min(seconds, max(0.0, end - time.monotonic())))
            if time.monotonic() < end:
                return False
            done.append(member.layout.rank)
            return True

        wait_for_all(member, wait, lambda: "it waits", LIMIT)
        return sorted(set(done))

    assert Team(4, 2, LIMIT.total_seconds()).run(work) == [[0, 2]] * 4
