"""How held-out items are cut into forward passes over data ranks."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest

from gapo_mega.runs.data_run import DataRun
from tests.helpers.fake_engine import FakeEngine, layout


@pytest.mark.parametrize("in_step", [False, True])
@pytest.mark.parametrize("size", [1, 2, 3])
@pytest.mark.parametrize("ranks", [1, 2, 3])
@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
def test_every_item_counts_once(count: int, ranks: int, size: int, in_step: bool) -> None:
    """Ranks that share experts take equally many passes, of which some do not count."""
    passes = []
    for rank in range(ranks):
        place = replace(layout(rank, ranks, ranks), in_step=in_step)
        run: Any = SimpleNamespace(engine=FakeEngine(place), config=SimpleNamespace(micro_batch_size=size))
        passes.append(list(DataRun._own(run, count, [10 - i for i in range(count)])))
    assert sorted(i for own in passes for items, counts in own if counts for i in items) == list(range(count))
    assert all(0 < len(items) <= size for own in passes for items, _ in own)
    if in_step:
        assert len({len(own) for own in passes}) == 1
    else:
        assert all(counts for own in passes for _, counts in own)
