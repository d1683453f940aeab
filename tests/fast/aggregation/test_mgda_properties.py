"""The properties that TorchJD publishes for aggregators (arXiv 2406.16232, section 3), for our MGDA.

An aggregator A maps a matrix J of m gradients to a vector:
- non-conflicting: J A(J) >= 0 for every J;
- permutation invariant: A(PJ) = A(J) for every permutation P;
- weighted: A(J) = J' w for some w(J), so that A(J) lies in the span of the gradients; and w depends on
  J J' alone (TorchJD's structure that makes a Gram matrix enough), so that A(JQ) = A(J)Q for every
  rotation Q of the parameters.
"""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapo_mega import aggregation, ops
from tests.helpers.grams import families

FAMILIES = sorted({*families(2, 0)} - {"denormal gram", "huge gram"})  # outside fp32's range, as rows


def aggregate(matrix: Tensor) -> Tensor:
    rows = list(matrix.float().contiguous())
    out = torch.empty(matrix.shape[1])
    assert ops.aggregate_(out, rows, None, None, aggregation.build("mgda")).ok()
    return out.double()


def length(matrix: Tensor) -> float:
    return float(matrix.norm(dim=1).max())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(2, 8), st.integers(0, 50))
def test_no_gradient_is_in_conflict_with_the_direction(family: str, m: int, seed: int) -> None:
    matrix = families(m, seed)[family].float().double()
    direction = aggregate(matrix)
    norms = matrix.norm(dim=1)
    # The direction is a sum of m terms in fp32; terms far larger than their sum leave their rounding.
    weights = aggregation.build("mgda")(ops.gramian(list(matrix.float().contiguous())))
    size = float((weights * norms).sum())
    assert bool((matrix @ direction >= -1e-6 * norms * size).all())


@settings(max_examples=60, deadline=None)
@given(st.sampled_from(FAMILIES), st.integers(2, 8), st.integers(0, 50))
def test_the_order_of_the_gradients_does_not_matter(family: str, m: int, seed: int) -> None:
    matrix = families(m, seed)[family]
    order = torch.randperm(m, generator=torch.Generator().manual_seed(seed))
    # Not the weights, which several minimisers may share out in other ways, but the direction.
    found, permuted = aggregate(matrix), aggregate(matrix[order])
    torch.testing.assert_close(permuted, found, rtol=0, atol=3e-6 * length(matrix))


@pytest.mark.parametrize("m", [2, 4, 8])
def test_the_direction_turns_with_the_parameters(m: int) -> None:
    generator = torch.Generator().manual_seed(m)
    matrix = torch.randn(m, 40, generator=generator, dtype=torch.float64)
    rotation = torch.linalg.qr(torch.randn(40, 40, generator=generator, dtype=torch.float64))[0]
    # fp32 rows: 2^-24 of each element, and the weights follow continuously.
    torch.testing.assert_close(
        aggregate(matrix @ rotation), aggregate(matrix) @ rotation, rtol=0, atol=1e-5 * length(matrix)
    )


@pytest.mark.parametrize("m", [2, 4, 8])
def test_the_direction_lies_in_the_span_of_the_gradients(m: int) -> None:
    matrix = torch.randn(m, 60, generator=torch.Generator().manual_seed(m), dtype=torch.float64)
    direction = aggregate(matrix)
    basis = torch.linalg.qr(matrix.T)[0]
    torch.testing.assert_close(basis @ (basis.T @ direction), direction, rtol=0, atol=1e-6 * length(matrix))
