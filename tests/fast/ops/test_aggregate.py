"""aggregate_: the whole path in one call, on whole rows and over several processes."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation, ops
from gapo_mega.ops import reference


def rows_of(m: int, dtype: torch.dtype = torch.float32) -> list[list[Tensor]]:
    generator = torch.Generator().manual_seed(m)
    return [[torch.randn(n, generator=generator).to(dtype) for n in (301, 0, 77)] for _ in range(m)]


def first_weighs_all(gram: Tensor) -> Tensor:
    """An aggregator of a user's own: any function of the Gram matrix."""
    assert gram.device.type == "cpu"
    weights = torch.zeros(gram.shape[0])
    weights[0] = 1.0
    return weights


@pytest.mark.parametrize("name", ["gapo", "p_gapo", "mgda", "weighted_sum"])
@pytest.mark.parametrize("m", [1, 2, 5, 9])
def test_it_is_gram_weights_and_combination(name: str, m: int) -> None:
    rows = rows_of(m)
    segments = [(3, 200), (310, 378)]
    weight = [torch.rand(piece.numel()) for piece in rows[0]]
    aggregator = aggregation.build(name)
    expected_gram = reference.gramian(rows, segments=segments, weight=weight)
    expected = reference.combine_(
        [torch.empty_like(piece, dtype=torch.float64) for piece in rows[0]], rows, aggregator(expected_gram)
    )
    found = ops.aggregate_(rows[-1], rows, segments, None, aggregator, weight=weight)
    assert found.ok()
    # Sums of at most 378 products in fp64, then fp32 arithmetic on m summands of ordinary size.
    torch.testing.assert_close(found.gram, expected_gram, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(found.weights, aggregator(expected_gram), rtol=1e-9, atol=1e-12)
    for piece, right in zip(rows[-1], expected, strict=True):
        torch.testing.assert_close(piece.double(), right, rtol=1e-5, atol=1e-5)


def test_any_function_will_do() -> None:
    rows = rows_of(3)
    first = [piece.clone() for piece in rows[0]]
    found = ops.aggregate_(rows[2], rows, None, None, first_weighs_all)
    assert found.ok() and found.weights.dtype == torch.float64
    assert all(torch.equal(a, b) for a, b in zip(rows[2], first, strict=True))


@pytest.mark.parametrize("aggregator", [aggregation.build("gapo"), first_weighs_all])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_a_status_and_never_weights(bad: float, aggregator: ops.HostAggregator) -> None:
    rows = rows_of(3)
    rows[1][2][5] = bad
    found = ops.aggregate_(rows[2], rows, None, None, aggregator)
    assert not found.ok()
    assert int(found.status) == ops.Status.NOT_FINITE
    assert found.weights.tolist() == [0.0] * 3
    assert all(not bool(piece.any()) for piece in rows[2])
    assert torch.isfinite(found.gram.diagonal()).tolist() == [True, False, True]


def test_an_error_of_the_aggregator_leaves_everything_as_it_was() -> None:
    def refuses(gram: Tensor) -> Tensor:
        raise ValueError("not today")

    rows = rows_of(2)
    before = [piece.clone() for piece in rows[1]]
    with pytest.raises(ValueError, match="not today"):
        ops.aggregate_(rows[1], rows, None, None, refuses)
    assert all(torch.equal(a, b) for a, b in zip(rows[1], before, strict=True))


@pytest.mark.parametrize("weights", [[1.0], [1.0, float("nan")], [float("inf"), 0.0]])
def test_weights_of_an_aggregator_that_are_none_are_refused(weights: list[float]) -> None:
    rows = rows_of(2)
    before = rows[1][0].clone()
    with pytest.raises(ValueError, match="aggregator: found the weights"):
        ops.aggregate_(rows[1], rows, None, None, lambda gram: torch.tensor(weights))
    assert torch.equal(rows[1][0], before)


def test_arguments_are_checked_before_anything_is_done() -> None:
    def never(gram: Tensor) -> Tensor:
        raise AssertionError("asked for weights")

    rows = rows_of(2)
    with pytest.raises(ValueError, match="out: found pieces of lengths"):
        ops.aggregate_(torch.empty(3), rows, None, None, never)


def test_an_answer_is_equal_to_itself_only() -> None:
    """Python 3.13 compares a dataclass field by field, for which tensors have no answer."""
    gram = torch.eye(2, dtype=torch.float64)
    first, second = (ops.solve(gram, aggregation.build("mgda")) for _ in range(2))
    assert torch.equal(first.weights, second.weights)
    assert first == first and first != second
    assert [second, first].index(first) == 1
    assert first.to(torch.device("cpu")) is first
    assert first.to(torch.device("meta")) != first
