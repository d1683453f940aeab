"""Which items a rank takes at a step: shared out, reshuffled every epoch, and the same as ever."""

from __future__ import annotations

from itertools import chain

import pytest

from gapo_mega.data.order import PROMPTS, Order

# Recorded once, when prompts and supervised items were ordered by two classes of their own: 11 items, 4 a
# step, the first five steps. A change of these numbers would change every run that resumes.
RECORDED = {
    5: [[2, 10, 3, 1], [7, 9, 0, 6], [4, 5, 1, 7], [6, 3, 9, 2], [2, 9, 7, 6]],
    0: [[0, 6, 2, 9], [5, 10, 4, 1], [9, 7, 2, 6], [8, 5, 0, 10], [4, 6, 9, 0]],
    -3: [[0, 10, 6, 1], [3, 2, 7, 9], [7, 6, 4, 3], [9, 0, 10, 5], [2, 10, 1, 6]],
}


@pytest.mark.parametrize("seed", RECORDED)
def test_orders_are_those_that_were_recorded(seed: int) -> None:
    assert [Order(11, 4, 0, 1, seed).items(step) for step in range(5)] == RECORDED[seed]
    for rank in (0, 1):
        half = [items[2 * rank : 2 * rank + 2] for items in RECORDED[seed]]
        assert [Order(11, 4, rank, 2, seed).items(step) for step in range(5)] == half
    unshuffled = Order(5, 2, 1, 2, seed, shuffle=False)
    assert [unshuffled.items(step) for step in range(5)] == [[1], [3], [1], [3], [1]]


@pytest.mark.parametrize("ranks", [1, 2, 3, 6])
def test_order_is_shared_out_and_does_not_depend_on_the_ranks(ranks: int) -> None:
    whole = Order(44, 12, 0, 1, seed=5)
    parts = [Order(44, 12, rank, ranks, seed=5) for rank in range(ranks)]
    for step in range(10):
        dealt = [part.items(step) for part in parts]
        assert {len(items) for items in dealt} == {12 // ranks}
        assert list(chain(*dealt)) == whole.items(step)
        assert len(set(whole.items(step))) == 12


def test_order_covers_every_epoch_and_resumes_at_any_step() -> None:
    order = Order(44, 12, 0, 1, seed=5)
    assert order.steps_per_epoch == 3
    steps = [order.items(step) for step in range(9)]
    epochs = [list(chain(*steps[i : i + 3])) for i in (0, 3, 6)]
    assert all(len(set(epoch)) == 36 and set(epoch) <= set(range(44)) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) == 3
    assert [Order(44, 12, 0, 1, seed=5).items(step) for step in (7, 2, 4)] == [steps[7], steps[2], steps[4]]
    assert Order(44, 12, 0, 1, seed=6).items(0) != steps[0]


def test_order_without_shuffling_repeats_itself() -> None:
    unshuffled = Order(4, 2, 0, 1, seed=5, shuffle=False)
    assert list(chain(*(unshuffled.items(step) for step in range(4)))) == [0, 1, 2, 3] * 2


def test_impossible_orders_are_refused() -> None:
    with pytest.raises(
        ValueError, match=r"^batch_size: found 12, accepted for 5 data-parallel ranks: a mult"
    ):
        Order(44, 12, 0, 5, seed=5)
    with pytest.raises(ValueError, match=r"^batch_size: found 12, accepted: 1 to the 11 training items$"):
        Order(11, 12, 0, 1, seed=5)
    with pytest.raises(
        ValueError,
        match=r"^rollout.prompts_per_step: found 6, accepted for 4 data-parallel ranks: a multiple",
    ):
        Order(20, 6, 0, 4, seed=1, wording=PROMPTS)
    with pytest.raises(
        ValueError,
        match=r"^rollout.prompts_per_step: found 8, accepted: at most the 5 training prompts$",
    ):
        Order(5, 8, 0, 1, seed=1, wording=PROMPTS)
