"""What an aggregator remembers: of the steps that it was told of, and of no others."""

from __future__ import annotations

import json

import pytest
import torch
from torch import Tensor

from gapo_mega import ops
from tests.helpers.aggregators import OnDevice, OnHost, Remembering

KINDS = [OnHost, OnDevice]


def diagonal(*squares: float) -> Tensor:
    return torch.diag(torch.tensor(squares, dtype=torch.float64))


@pytest.mark.parametrize("kind", KINDS)
def test_only_what_is_committed_counts(kind: type[Remembering]) -> None:
    """n^2 is 4, then 32 + 4 / 2 = 34, then 8 + 34 / 2 = 25; the second objective's is 16, 16 / 2, 4."""
    aggregator = kind()
    for squares, expected in (
        ((4.0, 16.0), (4.0, 16.0)),
        ((32.0, 0.0), (34.0, None)),
        ((8.0, 0.0), (25.0, None)),
    ):
        ops.solve(diagonal(1e6, 1e-6), aggregator)  # a minibatch that is skipped
        ops.solve(diagonal(float("nan"), 1.0), aggregator)
        found = ops.solve(diagonal(*squares), aggregator)
        weights = [0.0 if square is None else square**-0.5 for square in expected]
        assert found.weights.tolist() == pytest.approx(weights, rel=1e-14)
        aggregator.commit(found)
    assert aggregator.state_dict() == {"before": [25.0, 4.0]}
    last = ops.solve(diagonal(3.5, 7.0), aggregator)
    assert last.weights.tolist() == pytest.approx([16.0**-0.5, 9.0**-0.5], rel=1e-14)


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_that_is_resumed_goes_on_with_the_same_weights(kind: type[Remembering]) -> None:
    straight, resumed = kind(), kind()
    straight.commit(ops.solve(diagonal(4.0, 16.0), straight))
    state = json.loads(json.dumps(straight.state_dict()))
    ops.solve(diagonal(5.0, 5.0), straight)
    resumed.load_state_dict(state)
    gram = diagonal(2.0, 3.0)
    assert torch.equal(ops.solve(gram, straight).weights, ops.solve(gram, resumed).weights)
    assert not torch.equal(ops.solve(gram, kind()).weights, ops.solve(gram, resumed).weights)


@pytest.mark.parametrize("kind", KINDS)
def test_a_loop_of_ones_own_commits_what_it_combined(kind: type[Remembering]) -> None:
    """Rows of squared norms 4 and 16, then 18 and 1, to which half of the first are added."""
    aggregator = kind()
    found = ops.aggregate_(
        torch.empty(2), [torch.tensor([2.0, 0]), torch.tensor([0, 4.0])], None, None, aggregator
    )
    assert found.weights.tolist() == pytest.approx([1 / 2, 1 / 4], rel=1e-14)
    aggregator.commit(found)
    found = ops.aggregate_(
        torch.empty(2), [torch.tensor([3.0, 3.0]), torch.tensor([0, 1.0])], None, None, aggregator
    )
    assert found.weights.tolist() == pytest.approx([20**-0.5, 1 / 3], rel=1e-14)
