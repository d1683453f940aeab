"""What a run that ends early keeps: the state before the step, and why ranks may not save."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import pytest
import torch

from gapo_mega.runs.leaving import Before, meet, obstacle, stand_together
from gapo_mega.runs.processes import Alone
from tests.helpers.fake_engine import FakeEngine
from tests.helpers.held_runs import Threads, on_ranks


def draws() -> tuple[float, float, float]:
    return random.random(), float(np.random.rand()), float(torch.rand(1))


def test_random_numbers_and_state_come_back() -> None:
    state: dict[str, Any] = {"mean": torch.tensor([1.0, 2.0]), "seen": [1]}
    engine = FakeEngine()
    engine.changes = 7
    before = Before.of(engine, state)
    expected = draws()
    state["mean"] += 1  # what a step does
    state["seen"].append(2)
    state["new"] = True
    restored = before.restore(engine)
    assert before.changes == 7
    assert restored.keys() == {"mean", "seen"} and restored["seen"] == [1]
    torch.testing.assert_close(restored["mean"], torch.tensor([1.0, 2.0]), rtol=0, atol=0)
    assert draws() == expected
    restored["seen"].append(3)
    assert before.restore(engine)["seen"] == [1]  # a copy each time


@pytest.mark.parametrize(
    ("told", "why"),
    [
        ([(4, True), (4, True), (4, True)], None),
        ([(4, True), (4, False), (4, True)], "step 5 was cut short after its updates had begun"),
        ([(4, True), (5, True), (4, True)], "step 5 was cut short after its updates had begun"),
    ],
)
def test_ranks_that_stand_elsewhere_are_an_obstacle(told: list[tuple[int, bool]], why: str | None) -> None:
    """A rank that has done another step is ahead of the others: its state is that of another step."""

    def work(everyone: Threads, rank: int) -> object:
        step, untouched = told[rank]
        return obstacle(meet(everyone, step, untouched), step)

    first, _, third = on_ranks(3, work)
    assert first == third == why


class Missing:
    """Peers of whom some do not come."""

    rank, size = 0, 4
    is_main = True

    def __init__(self, *missing: int) -> None:
        self._missing = missing

    def gather(self, value: Any) -> list[Any]:
        raise AssertionError("nobody may wait without an end here")

    def leave(self, value: Any, seconds: float) -> list[Any]:
        assert 0 < seconds <= 60
        return [None if rank in self._missing else value for rank in range(4)]


def test_ranks_that_do_not_come_are_named() -> None:
    assert obstacle(meet(Missing(2), 4, True), 4) == "rank 2 did not answer within 30 s"
    assert obstacle(meet(Missing(1, 3), 4, True), 4) == "ranks 1, 3 did not answer within 30 s"
    assert obstacle(meet(Missing(), 4, True), 4) is None


@pytest.mark.parametrize("untouched", [True, False])
def test_a_single_process_asks_nobody(untouched: bool) -> None:
    assert (obstacle(meet(Alone(), 1, untouched), 1) is None) is untouched


@pytest.mark.parametrize(
    ("told", "together"),
    [([[4, True], [4, False]], True), ([[4, True], [5, True]], False), ([[4, True], None], False)],
)
def test_only_ranks_after_the_same_step_can_do_anything_together(told: list[Any], together: bool) -> None:
    assert stand_together(told) is together
