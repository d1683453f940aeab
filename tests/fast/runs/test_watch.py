"""Signs of life between ranks, which are threads here: who is lost, who is not, and what is said."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from datetime import timedelta
from typing import Any

import pytest
import torch.distributed as dist

from gapo_mega import whereabouts
from gapo_mega.runs import watch
from gapo_mega.runs.watch import Sign, Watch
from gapo_mega.whereabouts import Place

PERIOD = 0.1  # seconds between two signs
LIMIT = timedelta(seconds=1.2)  # far more than that, on a busy machine too


class Rank:
    """A watch, and what it ended its process with."""

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self.said: list[str] = []
        self.ended = threading.Event()
        self.watch = Watch(store, rank, size, LIMIT, self._end, to_leave=0.3)

    def _end(self, message: str) -> None:
        self.said.append(message)
        self.ended.set()

    def go_silent(self) -> None:
        """As a process that is stopped: no thread of it runs any more, and nothing is said."""
        self.watch._give_sign = lambda ended=False: None
        self.watch._stopping.set()


@pytest.fixture
def store() -> Any:
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


@pytest.fixture
def ranks(store: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[list[Rank]]:
    monkeypatch.setattr(watch, "_FASTEST", PERIOD)
    found = [Rank(store, rank, 3) for rank in range(3)]
    for rank in found:
        rank.watch.start()
    yield found
    for rank in found:
        rank.watch.stop()


def settle(ranks: list[Rank]) -> None:
    """Wait until every rank has heard where those are now that it watches."""
    here, end = whereabouts.here(), time.monotonic() + 30
    watches = [rank.watch for rank in ranks]
    while any(
        other not in w._signs or w._signs[other].place != here for w in watches for other in w._watched
    ):
        assert time.monotonic() < end
        time.sleep(0.05)


def test_a_silent_rank_is_named_with_host_process_step_and_phase(ranks: list[Rank]) -> None:
    whereabouts.enter("score", 7)
    settle(ranks)
    ranks[1].go_silent()
    assert ranks[0].ended.wait(30)
    (said,) = ranks[0].said
    assert "has not heard of rank 1 for 1.2 s (parallel.silence_minutes); last heard: rank 1 (host " in said
    assert "is in step 7, score since " in said and "\n" not in said and "rank 2" not in said
    # Rank 2 does not watch rank 1, and hears of it.
    assert ranks[2].ended.wait(30)
    assert ranks[2].said[0].startswith("rank 2 ends, because another rank did: rank 0 on ")
    assert "has not heard of rank 1" in ranks[2].said[0]


def test_all_watch_rank_0(ranks: list[Rank]) -> None:
    settle(ranks)
    ranks[0].go_silent()
    for rank in ranks[1:]:
        assert rank.ended.wait(30)
        assert "has not heard of rank 0" in rank.said[0] or "because another rank did" in rank.said[0]


def test_a_rank_that_ended_well_is_not_missed(ranks: list[Rank]) -> None:
    ranks[1].watch.stop()
    ranks[0].watch.stop()
    assert not ranks[2].ended.wait(2 * LIMIT.total_seconds())


def test_a_rank_that_failed_ends_those_that_would_wait_for_it(ranks: list[Rank]) -> None:
    ranks[2].watch.stop("rank 2 on a host failed in step 3, score: KeyError: 'x'")
    for rank in ranks[:2]:
        assert rank.ended.wait(30)
        assert rank.said == [
            f"rank {ranks.index(rank)} ends, because another rank did: rank 2 on a host failed in step 3, "
            "score: KeyError: 'x'"
        ]


def test_a_rank_that_ends_by_itself_after_another_one_failed_is_left_alone(ranks: list[Rank]) -> None:
    ranks[0].watch._to_leave = LIMIT.total_seconds()
    ranks[2].watch.stop("rank 2 failed")
    ranks[0].watch.stop()
    assert not ranks[0].ended.wait(2 * LIMIT.total_seconds())


def test_a_long_phase_is_no_silence(ranks: list[Rank]) -> None:
    """The main thread does nothing for longer than the limit."""
    assert not ranks[0].ended.wait(2 * LIMIT.total_seconds())
    assert not ranks[1].ended.is_set() and not ranks[2].ended.is_set()


def test_a_store_that_does_not_answer_is_found_though_its_call_never_returns(
    store: Any, ranks: list[Rank], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As over a link that is cut: no error comes."""
    monkeypatch.setattr(watch, "_TO_TELL", 0.3)
    settle(ranks)
    forever = threading.Event()

    class Mute:
        def set(self, *_: Any) -> None:
            forever.wait(60)
            raise RuntimeError("Connection reset by peer")

        compare_set = set

    ranks[2].watch._store = Mute()
    assert ranks[2].ended.wait(30)
    forever.set()
    assert "has not heard of the job's store, and with it rank 0 for 1.2 s" in ranks[2].said[0]
    assert "last heard: rank 0 (host " in ranks[2].said[0]


def test_a_process_that_was_stopped_itself_forgives(store: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """After SIGSTOP and SIGCONT of all ranks nobody has been heard for long, and nobody is lost."""
    rank = Rank(store, 0, 2)
    rank.watch._heard, rank.watch._answered = {1: 0.0}, 0.0  # heard long ago
    clock = iter([0.0, 1000.0, 1000.1])
    monkeypatch.setattr(watch.time, "monotonic", lambda: next(clock, 1000.2))
    monkeypatch.setattr(rank.watch._stopping, "wait", lambda _: next(clock, None) is None)
    rank.watch._judge()
    assert rank.said == []


def test_an_explanation_says_who_waited_where_for_whom(ranks: list[Rank]) -> None:
    place = Place(4, "update after backward", time.time() - 12)
    error = RuntimeError("[gloo/unbound_buffer.cc:78] Timed out waiting 12000ms for recv operation")
    said = ranks[0].watch.explain(error, place)
    assert said.startswith("rank 0 on ") and "lost the others 12 s into step 4, update after backward" in said
    assert "Timed out waiting 12000ms" in said and "\n" not in said
    assert "rank 1 (host " in said and "rank 2 (host " in said


def test_a_rank_that_has_found_out_by_itself_leaves_in_its_own_time(ranks: list[Rank]) -> None:
    """It may still write a checkpoint, or wait for others that do so."""
    ranks[1].go_silent()
    ranks[0].watch.explain(RuntimeError("Connection closed by peer"), Place(3, "score", time.time()))
    assert not ranks[0].ended.wait(3 * LIMIT.total_seconds())


def test_an_explanation_has_the_cause_though_nobody_looked_since(ranks: list[Rank]) -> None:
    """Connections close as soon as a process ends; the next look at the store may be seconds away."""
    ranks[0].watch._stopping.set()
    ranks[2].watch.stop("rank 2 failed in step 3, score: KeyError: 'x'")
    said = ranks[0].watch.explain(RuntimeError("Connection closed by peer"), Place(3, "score", time.time()))
    assert said.endswith("; rank 2 failed in step 3, score: KeyError: 'x'")
    assert "rank 2 (host " in said and ") has ended" in said


def test_signs_are_read_as_they_were_written() -> None:
    sign = Sign(3, "host", 17, Place(2, "a phase", 1.5), True)
    assert Sign.decoded(sign.encoded()) == sign
    assert sign.told(4) == "rank 4 (host host, process 17) has ended"
