"""The meeting of ranks in a store that keeps what dead ranks wrote. Ranks are threads."""

from __future__ import annotations

import json
import logging
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta

import pytest
import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore

from gapo_mega.planning import meeting
from gapo_mega.planning.world import World

PATIENCE = timedelta(seconds=20)


@pytest.fixture
def kept() -> dist.TCPStore:
    """The store of an agent, which outlives the workers."""
    return dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)


def client(kept: dist.TCPStore) -> dist.Store:
    return PrefixStore("gapo-mega", dist.TCPStore("127.0.0.1", kept.port, is_master=False))


def handshake(kept: dist.TCPStore, rank: int, size: int, patience: timedelta = PATIENCE) -> str:
    return meeting._Handshake(client(kept), World(rank, size), patience).number()


def met(kept: dist.TCPStore, size: int) -> list[str]:
    with ThreadPoolExecutor(size) as pool:
        return list(pool.map(lambda rank: handshake(kept, rank, size), range(size)))


@pytest.mark.parametrize("size", [2, 5])
def test_every_attempt_agrees_on_a_number_of_its_own(kept: dist.TCPStore, size: int) -> None:
    attempts = [met(kept, size) for _ in range(3)]
    assert all(len(set(numbers)) == 1 for numbers in attempts)
    assert len({numbers[0] for numbers in attempts}) == 3


def test_a_rank_that_came_and_died_is_not_counted(kept: dist.TCPStore) -> None:
    """Its hello and its answer stay in the store. The others are as they were: they still wait."""
    with ThreadPoolExecutor(3) as pool:
        waiting = [pool.submit(handshake, kept, rank, 3) for rank in (0, 1)]
        store = client(kept)
        store.set("hello/2", "dead")
        while json.loads(store.get("offer"))[1][2] != "dead":
            pass
        waiting.append(pool.submit(handshake, kept, 2, 3))
        numbers = {future.result() for future in waiting}
    assert len(numbers) == 1


@pytest.mark.parametrize(
    ("rank", "there", "missing"), [(0, [0, 2], "rank 1"), (0, [0], "ranks 1, 2"), (2, [1, 2], "rank 0")]
)
def test_who_is_missing_is_named_also_where_earlier_attempts_were_complete(
    kept: dist.TCPStore, rank: int, there: list[int], missing: str
) -> None:
    met(kept, 3)
    with ThreadPoolExecutor(3) as pool:
        asked = {each: pool.submit(handshake, kept, each, 3, timedelta(seconds=1)) for each in there}
        with pytest.raises(TimeoutError, match=f"^no answer from {missing}$"):
            asked[rank].result()


def test_a_process_meets_once(kept: dist.TCPStore, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(meeting, "_met", {})
    monkeypatch.setattr(meeting, "_connect", lambda *_: dist.TCPStore("127.0.0.1", kept.port))
    world = World(0, 1, 0, "somewhere:1")
    first = meeting.meet(world, PATIENCE, logging.getLogger(__name__))
    assert meeting.meet(world, PATIENCE, logging.getLogger(__name__)) is first
    first.store.set("key", "of this attempt")
    first.lasting.set("key", "of all")
    meeting._met.clear()  # the next attempt's process
    second = meeting.meet(world, PATIENCE, logging.getLogger(__name__))
    assert not second.store.check(["key"])
    assert second.lasting.get("key") == b"of all"
