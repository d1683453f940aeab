"""Weights or combinations that fp32 does not hold are a status, and never zeros or NaN."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from gapo_mega import aggregation, ops
from gapo_mega.ops import Status, portable
from gapo_mega.ops.arguments import parse_out, parse_rows

SMALLEST, LARGEST = 2.0**-126, 3.4028234663852886e38  # normal numbers of IEEE 754's binary32


def rows_of(*sizes: float) -> list[Tensor]:
    """Rows of three elements at right angles, each element of the size given."""
    signs = [[1.0, 1.0, 0.0], [1.0, -1.0, 0.0], [0.0, 0.0, 1.0]]
    return [torch.tensor(s) * size for s, size in zip(signs, sizes, strict=False)]


def found_with(weights: list[float], rows: list[Tensor]) -> tuple[ops.Aggregated, Tensor]:
    out = torch.full((3,), 7.0)
    given_weights = torch.tensor(weights, dtype=torch.float64)
    return ops.aggregate_(out, rows, None, None, lambda gram: given_weights), out


@pytest.mark.parametrize(
    ("weights", "status"),
    [
        ([1.0, LARGEST / 4], Status.OK),
        ([0.0, LARGEST / 4], Status.OK),
        ([1.0, 3.5e38], Status.OUT_OF_RANGE),
        ([1.0, -3.5e38], Status.OUT_OF_RANGE),
        ([1.0, LARGEST], Status.OUT_OF_RANGE),  # the weight is a number of fp32, the combination is not
        ([1e200, 1e200], Status.OUT_OF_RANGE),
        ([1.0, SMALLEST], Status.OK),
        ([1.0, -SMALLEST], Status.OK),
        ([1.0, SMALLEST / 2], Status.OK),  # beside the other it vanishes, whatever it is rounded to
        ([1.0, -1e-50], Status.OK),
        ([SMALLEST / 2, SMALLEST / 2], Status.OUT_OF_RANGE),
        ([1e-200, 1e-300], Status.OUT_OF_RANGE),
        ([0.0, 0.0], Status.OK),
    ],
)
def test_weights_are_judged_against_fp32(weights: list[float], status: Status) -> None:
    found, out = found_with(weights, rows_of(1.0, 1.0))
    assert int(found.status) == status
    if status == Status.OK:
        expected = torch.tensor(weights, dtype=torch.float64) @ torch.stack(rows_of(1.0, 1.0)).double()
        torch.testing.assert_close(out.double(), expected, rtol=1e-6, atol=0)  # two roundings of fp32
    else:
        assert found.weights.tolist() == [0.0, 0.0] and not bool(out.any())
        assert found.proposed.tolist() == weights


@pytest.mark.parametrize(
    ("weight", "size", "status"),
    [(1e-25, 1e-20, Status.OUT_OF_RANGE), (1e25, 1e20, Status.OUT_OF_RANGE), (1e25, 1e-30, Status.OK)],
)
def test_the_combination_is_judged_against_fp32(weight: float, size: float, status: Status) -> None:
    found, out = found_with([weight], rows_of(size))
    assert int(found.status) == status
    expected = weight * size if status == Status.OK else 0.0
    assert out[0].item() == pytest.approx(expected, rel=1e-6)


def test_a_functions_weights_out_of_range_are_told_in_words() -> None:
    aggregator = ops.method_of(lambda gram: torch.tensor([1e-50, 2e-60], dtype=torch.float64))
    found = aggregator.weigh(torch.diag(torch.tensor([4.0, 9.0])).double())
    assert str(aggregator.error(found)) == (
        "aggregator: found the weights [1e-50, 2e-60] for gradients of norm [2.0, 3.0], outside the range of "
        "float32 (1.2e-38 to 3.4e+38), in which gradients are weighted and summed"
    )
    with pytest.raises(ValueError, match="outside the range of float32"):
        aggregator(torch.diag(torch.tensor([4.0, 9.0])).double())


def test_a_small_weight_of_a_long_row_is_no_small_matter() -> None:
    found, _ = found_with([1e-30, 1e-42], rows_of(1e-20, 1e-6))
    assert int(found.status) == Status.OUT_OF_RANGE


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(["gapo", "p_gapo", "mgda", "weighted_sum"]),
    st.sampled_from(["none", "sum_to_one", "mean_norm"]),
    st.floats(0.0, 40.0),
    st.lists(st.floats(-18.0, 18.0), min_size=1, max_size=3),
)
def test_ok_means_that_the_combination_is_right(
    name: str, scale: str, p: float, exponents: list[float]
) -> None:
    """Against float64, for every method, every p and norms from 1e-18 to 1e18."""
    options = {"p": p} if name == "gapo" else {}
    method = aggregation.build(name, scale=scale, **options)
    rows = rows_of(*(10.0**e for e in exponents))
    out = torch.full((3,), 7.0)
    found = ops.aggregate_(out, rows, None, None, method)
    if not found.ok():
        assert int(found.status) == Status.OUT_OF_RANGE and not bool(out.any())
        assert "outside the range of float32" in str(method.error(found))
        return
    exact = torch.stack(rows).double()
    size = float((found.weights.abs() * exact.norm(dim=1)).sum())
    # Two roundings of fp32 for each of at most three summands.
    torch.testing.assert_close(out.double(), found.weights @ exact, rtol=0, atol=1e-6 * size)
    assert bool(out.any())


@pytest.mark.parametrize("weights", [[1e39, 1.0], [-1e39, 1.0], [0.0, 1e-46], [1e-39, 1e-40], [1e300, 0.0]])
def test_combine_refuses_weights_that_fp32_does_not_hold(weights: list[float]) -> None:
    rows = rows_of(1.0, 1.0)
    out = torch.full((3,), 7.0)
    with pytest.raises(ValueError, match=r"weights: found \[.*\], accepted: finite .* float32"):
        ops.combine_(out, rows, weights)
    assert out.tolist() == [7.0] * 3


@pytest.mark.parametrize("weights", [[0.5, 0.0], [1e30, -1e-30], [SMALLEST, 0.0]])
def test_the_torch_fallback_equals_the_kernel_at_the_ends_of_the_range(weights: list[float]) -> None:
    rows = rows_of(1.5, 2.5)
    fallback = torch.empty(3)
    parsed = parse_rows("rows", rows)
    portable.combine(parse_out(fallback, parsed), parsed, torch.tensor(weights, dtype=torch.float64))
    kernel = ops.combine_(torch.empty(3), rows, weights)
    assert isinstance(kernel, Tensor)
    torch.testing.assert_close(fallback, kernel, rtol=2.0**-23, atol=0)  # a fused operation or two
