"""The exact quadratic programs against enumeration, SciPy, and their own optimality conditions."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from gapo_mega.aggregation import safe_weights
from gapo_mega.aggregation.base import cosine_matrix
from gapo_mega.aggregation.quadratic import increments
from tests.helpers.grams import families

# A denormal Gram matrix has lost the digits that make it positive semidefinite.
FAMILIES = sorted({*families(2, 0)} - {"zero row", "denormal gram"})


def random_rows(m: int, seed: int, dimensions: int | None = None) -> Tensor:
    generator = torch.Generator().manual_seed(1000 * m + seed)
    rows = torch.randn(m, dimensions or m + 2, generator=generator, dtype=torch.float64)
    return rows - 1.1 * rows.mean(dim=0)  # in conflict, so that several bounds are active


def by_enumeration(gram: np.ndarray, bounds: np.ndarray) -> np.ndarray:
    """``argmin v'Gv, v >= bounds`` over every set of objectives that are raised."""
    best = bounds.copy()
    for size in range(1, len(gram) + 1):
        for raised in map(list, combinations(range(len(gram)), size)):
            v = bounds.copy()
            v[raised] -= np.linalg.solve(gram[np.ix_(raised, raised)], gram[raised] @ bounds)
            if (v >= bounds - 1e-12).all() and v @ gram @ v < best @ gram @ best:
                best = v
    return best


@pytest.mark.parametrize("m", [1, 2, 3, 5, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_weights_are_those_of_enumeration(m: int, seed: int) -> None:
    rows = random_rows(m, seed) * torch.logspace(0, 2, m, dtype=torch.float64)[:, None]
    bounds = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    gram = rows @ rows.T
    found = safe_weights(gram, bounds)
    expected = torch.from_numpy(by_enumeration(gram.numpy(), bounds.numpy()))
    # Float64 solves of systems of condition 1e6 there, whose matrix is not rescaled.
    torch.testing.assert_close(
        found @ rows, expected @ rows, rtol=0, atol=1e-8 * float((expected @ rows).norm())
    )


@pytest.mark.parametrize("m", [2, 4, 8, 16])
def test_the_direction_is_that_of_scipy(m: int) -> None:
    for seed in range(5):
        rows = random_rows(m, seed, dimensions=max(2, m - 1))  # dependent
        rows /= rows.norm(dim=1, keepdim=True)
        bounds = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
        found = (bounds + increments(cosine_matrix(rows @ rows.T), bounds)) @ rows
        raised, _ = nnls(rows.T.numpy(), -(bounds @ rows).numpy(), maxiter=1000)
        expected = (bounds + torch.from_numpy(raised)) @ rows
        # From a factor of the rounded Gram matrix here, from the rows there.
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-6 * float(bounds.sum()))


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("m", [2, 3, 6, 9, 16])
def test_hard_gradients_satisfy_the_optimality_conditions(family: str, m: int) -> None:
    """Raised or at its bound; <d, g_i> >= 0, and 0 where raised: up to rounding of the summands."""
    for seed in range(3):
        rows = families(m, seed)[family]
        gram = rows @ rows.T
        norms = gram.diagonal().sqrt()
        given = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) / norms
        weights = safe_weights(gram, given)
        summands = weights * norms
        change = cosine_matrix((gram + gram.T) / 2) @ summands
        rounding = 1e-12 * float(summands.abs().sum())
        assert bool((weights >= given * (1 - 1e-12)).all())
        assert bool((change >= -rounding).all())
        raised = summands - given * norms
        assert float((raised * change).abs().max()) <= rounding * float(summands.abs().max())


@pytest.mark.parametrize("factor", [1e-290, 1e-150, 1e150, 1e290])
def test_the_scales_of_gradients_and_weights_do_not_matter(factor: float) -> None:
    rows = random_rows(4, 0)
    gram = rows @ rows.T
    given = torch.tensor([0.1, 0.2, 0.3, 0.4], dtype=torch.float64)
    expected = safe_weights(gram, given)
    assert not torch.equal(expected, given)
    # The factors are no powers of two, so that every product is rounded anew.
    torch.testing.assert_close(safe_weights(gram * factor, given), expected, rtol=1e-9, atol=0)
    torch.testing.assert_close(safe_weights(gram, given * factor), expected * factor, rtol=1e-9, atol=0)


def test_weights_that_hurt_nobody_stay_as_they_are_to_the_last_digit() -> None:
    gram = torch.tensor([[4.0, -1.0, 0.0], [-1.0, 9.0, 0.0], [0.0, 0.0, 0.0]], dtype=torch.float64)
    for given in ([0.3, 0.3, 0.4], [0.0, 1 / 3, -2.0], [0.0, 0.0, 0.0]):
        weights = torch.tensor(given, dtype=torch.float64)
        expected = weights.clone()
        if given[0] == 0.0 and given[1]:
            expected[0] = 1 / 12  # by hand: d = g_2 / 3 + v g_1 has <d, g_1> = -1/3 + 4 v = 0
        torch.testing.assert_close(safe_weights(gram, weights), expected, rtol=1e-14, atol=0)
