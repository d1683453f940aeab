"""Which items a data rank computes."""

from __future__ import annotations

import pytest

from gapo_mega.planning.shares import share


@pytest.mark.parametrize("count", range(9))
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("in_step", [False, True])
def test_every_item_is_one_ranks_own(count: int, ranks: int, in_step: bool) -> None:
    items = [f"item {i}" for i in range(count)]
    shares = [share(items, rank, ranks, in_step) for rank in range(ranks)]
    own = [item for taken, size in shares for item in taken[:size]]
    assert sorted(own) == items
    if in_step:
        assert len({len(taken) for taken, _ in shares}) == 1
    else:
        assert all(len(taken) == size for taken, size in shares)
