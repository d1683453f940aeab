"""TorchJD's properties of aggregators (arXiv 2406.16232, section 3) for every method, degenerate cases too.

An aggregator A maps a matrix J of gradients to a direction:
- permutation invariant: A(PJ) = A(J); here its weights permute with the objectives, which is more;
- non-conflicting: J A(J) >= 0. Promised by ``gapo`` and ``mgda``;
- linear under scaling: A(diag(c) J) is linear in c > 0, promised by ``weighted_sum``; ``gapo`` with p = 1 and
  ``p_gapo`` promise that it does not depend on c;
- strongly stationary: A(J) = 0 only where some convex combination of the gradients is 0.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torchjd.aggregation import MGDAWeighting

from gapo_mega.aggregation import build, diagnose
from gapo_mega.aggregation.base import cosine_matrix
from tests.helpers.grams import families

SCALES = ("none", "sum_to_one", "mean_norm")
NON_CONFLICTING: list[tuple[str, dict[str, Any]]] = [
    ("gapo", {}),
    ("gapo", {"p": 2}),
    ("gapo", {"p": 0.5}),
    ("mgda", {}),
]
FAMILIES = sorted({*families(2, 0)} - {"denormal gram", "huge gram"})  # of gradients in fp32


# By hand: what several objectives of a run really have in common.
DEGENERATE: dict[str, list[list[float]]] = {
    "parallel": [[1, 2], [2, 4], [5, 10]],
    "parallel and another": [[1, 2, 0], [3, 6, 0], [-1, 0, 1]],
    "duplicates": [[1, 2], [1, 2], [-2, 1]],
    "duplicates of two": [[1, 2], [-2, 1], [1, 2], [-2, 1]],
    "opposing": [[1, 2], [-1, -2]],
    "opposing, two against one": [[1, 2], [-1, -2], [2, 4]],
    "zero and parallel": [[0, 0], [1, 2], [2, 4]],
    "all zero": [[0, 0], [0, 0]],
    "a triangle around zero, and a copy": [[2, 0], [-1, 2], [-1, -2], [2, 0]],
    "a square around zero": [[1, 0], [0, 1], [-1, 0], [0, -1]],
    "equal norms": [[3, 4], [4, 3], [5, 0]],
}


def require_symmetric(name: str) -> None:
    """Skip the test for a method that declares that it takes the objectives in an order."""
    if not build(name).symmetric:
        pytest.skip(f"{name} takes the objectives in an order")


def gram_of(rows: Tensor | list[list[float]]) -> Tensor:
    matrix = torch.as_tensor(rows, dtype=torch.float64)
    gram = matrix @ matrix.T
    return (gram + gram.T) / 2


def weights_of(name: str, gram: Tensor, **options: Any) -> Tensor:
    return build(name, **options).weigh(gram).proposed


def assert_permutes(name: str, gram: Tensor, seed: int, **options: Any) -> None:
    require_symmetric(name)
    order = torch.randperm(len(gram), generator=torch.Generator().manual_seed(seed))
    found = weights_of(name, gram, **options)
    permuted = weights_of(name, gram[order][:, order], **options)
    norms = gram.diagonal().sqrt()
    # What counts is |w_i| ||g_i||. Near opposing rows leave ten digits of the weights.
    size = float((found.abs() * norms).max())
    torch.testing.assert_close(permuted * norms[order], (found * norms)[order], rtol=0, atol=1e-9 * size)


@pytest.mark.every("aggregation")
class TestPermutations:
    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("case", DEGENERATE)
    def test_weights_permute_with_degenerate_gradients(self, name: str, case: str, scale: str) -> None:
        for seed in range(6):
            assert_permutes(name, gram_of(DEGENERATE[case]), seed, scale=scale)

    @pytest.mark.parametrize("scale", SCALES)
    @pytest.mark.parametrize("family", FAMILIES)
    def test_weights_permute_with_gradients_that_are_hard_for_solvers(
        self, name: str, family: str, scale: str
    ) -> None:
        for m, seed in ((2, 0), (3, 1), (4, 2), (6, 3), (9, 4)):
            assert_permutes(name, gram_of(families(m, seed)[family]), seed, scale=scale)

    @pytest.mark.parametrize("scale", SCALES)
    def test_duplicated_objectives_share_alike(self, name: str, scale: str) -> None:
        require_symmetric(name)
        for case, (one, other) in (("duplicates", (0, 1)), ("duplicates of two", (1, 3))):
            weights = weights_of(name, gram_of(DEGENERATE[case]), scale=scale)
            assert float(weights[one]) == pytest.approx(float(weights[other]), rel=1e-12)

    @pytest.mark.parametrize("scale", SCALES)
    def test_the_length_of_the_direction_does_not_depend_on_the_order(self, name: str, scale: str) -> None:
        """The case that was wrong: parallel gradients of different length, of which one took all."""
        require_symmetric(name)
        for order in ([0, 1, 2], [2, 0, 1], [1, 2, 0]):
            rows = torch.tensor(DEGENERATE["parallel"], dtype=torch.float64)[order]
            length = float((weights_of(name, gram_of(rows), scale=scale) @ rows).norm())
            first = torch.tensor(DEGENERATE["parallel"], dtype=torch.float64)
            expected = float((weights_of(name, gram_of(first), scale=scale) @ first).norm())
            assert length == pytest.approx(expected, rel=1e-12)


def test_unit_gradients_that_are_parallel_have_a_closed_form() -> None:
    """Every convex combination is shortest, and their mean weighs all alike: w_i = 1 / (m ||g_i||)."""
    gram = gram_of(DEGENERATE["parallel"])
    norms = gram.diagonal().sqrt()
    torch.testing.assert_close(weights_of("gapo", gram), 1 / (3 * norms), rtol=1e-14, atol=0)
    summed = weights_of("gapo", gram, scale="sum_to_one")
    torch.testing.assert_close(summed, (1 / norms) / (1 / norms).sum(), rtol=1e-14, atol=0)


@settings(max_examples=100, deadline=None)
@given(st.sampled_from(NON_CONFLICTING), st.sampled_from(FAMILIES), st.integers(1, 8), st.integers(0, 50))
def test_no_objective_is_hurt(method: tuple[str, dict[str, Any]], family: str, m: int, seed: int) -> None:
    name, options = method
    gram = gram_of(families(max(m, 2), seed)[family][:m])
    weights = weights_of(name, gram, **options)
    norms = gram.diagonal().sqrt()
    # The matrix is rounded to 1e-16 of its entries, a common minimum to 1e-12 of its summands.
    assert bool((gram @ weights >= -1e-9 * norms * (weights * norms).sum()).all())


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("method", NON_CONFLICTING)
def test_no_objective_is_hurt_by_degenerate_gradients(method: tuple[str, dict[str, Any]], case: str) -> None:
    name, options = method
    gram = gram_of(DEGENERATE[case])
    assert diagnose(gram, weights_of(name, gram, **options)).hurt == []


# Zero is a convex combination of the gradients other than zero, or there are none.
STATIONARY = {
    case for case in DEGENERATE if "opposing" in case or "around zero" in case or case == "all zero"
}


@pytest.mark.parametrize("case", DEGENERATE)
@pytest.mark.parametrize("method", NON_CONFLICTING)
def test_the_direction_is_zero_exactly_where_the_gradients_are_stationary(
    method: tuple[str, dict[str, Any]], case: str
) -> None:
    name, options = method
    gram = gram_of(DEGENERATE[case])
    weights = weights_of(name, gram, **options)
    summands = float((weights * gram.diagonal().sqrt()).sum())
    length = diagnose(gram, weights).direction_norm
    stationary = case in STATIONARY
    assert (length <= 1e-7 * summands) == stationary  # the square is rounded to 1e-16


@settings(max_examples=60, deadline=None)
@given(st.integers(2, 6), st.integers(0, 1000))
def test_how_a_direction_follows_the_lengths_of_its_gradients(m: int, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, m + 2, generator=generator, dtype=torch.float64)
    one, other = (10 ** (4 * torch.rand(m, 1, generator=generator, dtype=torch.float64)) for _ in range(2))

    def direction(name: str, factors: Tensor) -> Tensor:
        return weights_of(name, gram_of(factors * rows)) @ (factors * rows)

    for name in ("gapo", "p_gapo"):  # it is the gradients' directions that count
        torch.testing.assert_close(direction(name, one), direction(name, other), rtol=1e-8, atol=1e-10)
    total = direction("weighted_sum", one) + direction("weighted_sum", other)
    torch.testing.assert_close(direction("weighted_sum", one + other), total, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize("m", [2, 3, 5, 8])
@pytest.mark.parametrize("family", ["generic", "duplicated", "rank one", "near parallel"])
def test_torchjd_finds_no_shorter_combination(m: int, family: str) -> None:
    """Its Frank-Wolfe iteration comes close from above; unit gradients, for which it converges."""
    for seed in range(4):
        gram = cosine_matrix(gram_of(families(m, seed)[family]))
        theirs = MGDAWeighting(epsilon=1e-6, max_iters=5000)(gram)
        ours = weights_of("mgda", gram)
        value, reached = float(ours @ gram @ ours), float(theirs @ gram @ theirs)
        assert value <= reached + 1e-12
        assert value == pytest.approx(reached, abs=2e-3)  # it converges with 1 / steps


@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1e200, 1e290])
@pytest.mark.parametrize("name", ["gapo", "mgda", "p_gapo", "weighted_sum"])
def test_a_factor_near_the_ends_of_double_precision_changes_no_weight(name: str, factor: float) -> None:
    gram = gram_of(DEGENERATE["parallel and another"])
    for scale in ("sum_to_one", "mean_norm"):
        found = build(name, scale=scale).weigh(gram * factor)
        assert found.ok()
        torch.testing.assert_close(found.weights, build(name, scale=scale)(gram), rtol=1e-9, atol=0)


@pytest.mark.parametrize(
    "weights", [[1e308, 1e308, 1e308], [5e-324, 5e-324, 5e-324], [1e-200, 1e-200, 1e-200]]
)
@pytest.mark.parametrize("scale", ["sum_to_one", "mean_norm"])
def test_only_the_ratios_of_weights_count_where_the_length_is_set(weights: list[float], scale: str) -> None:
    gram = gram_of(DEGENERATE["duplicates"])
    expected = build("weighted_sum", scale=scale)(gram)
    found = build("weighted_sum", weights=weights, scale=scale)(gram)
    torch.testing.assert_close(found, expected, rtol=1e-14, atol=0)


@pytest.mark.parametrize(
    ("name", "option"), [("gapo", "p"), ("p_gapo", "preference"), ("weighted_sum", "weights")]
)
def test_an_integer_that_no_float_holds_is_refused(name: str, option: str) -> None:
    value: Any = 10**400 if option == "p" else [10**400, 1]
    with pytest.raises(ValueError, match=f"{option}: found"):
        build(name, **{option: value})
