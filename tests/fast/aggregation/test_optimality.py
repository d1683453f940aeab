"""The equations and optimality conditions by which methods are defined, checked for themselves."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.optimize import minimize
from torch import Tensor

from gapo_mega.aggregation import build, diagnose, safe_weights
from gapo_mega.aggregation.base import cosine_matrix
from tests.helpers.grams import families

COUNTS = (2, 3, 5, 8)
NON_CONFLICTING = ("upgrad", "dual_proj")


def jacobian(m: int, seed: int, spread: float = 2.0) -> Tensor:
    """Gradients of norms up to 10^spread, some of them opposed."""
    generator = torch.Generator().manual_seed(100 * m + seed)
    rows = torch.randn(m, m + 2, generator=generator, dtype=torch.float64)
    rows -= 0.9 * rows.mean(dim=0)
    return rows * 10 ** (spread * torch.rand(m, 1, generator=generator, dtype=torch.float64))


def preference_of(m: int) -> list[float]:
    return [2 * (i + 1) / (m * (m + 1)) for i in range(m)]


# -- CAGrad ----------------------------------------------------------------------------------------------


def cagrad_by_slsqp(rows: np.ndarray, preference: np.ndarray, c: float) -> np.ndarray:
    """p on the simplex, from the best of several starts."""
    size = np.linalg.norm(rows, axis=1).max()
    rows = rows / size
    mean = preference @ rows
    radius = c * np.linalg.norm(mean)

    def value(p: np.ndarray) -> float:
        return float(p @ rows @ mean + radius * np.linalg.norm(p @ rows))

    m = len(rows)
    starts = [np.full(m, 1 / m), *(0.9 * np.eye(m) + 0.1 / m)]
    found = [
        minimize(
            value,
            start,
            bounds=[(0, 1)] * m,
            constraints=[{"type": "eq", "fun": lambda p: p.sum() - 1}],
            method="SLSQP",
            options={"ftol": 1e-15, "maxiter": 1000},
        )
        for start in starts
    ]
    return np.asarray(min(found, key=lambda result: result.fun).x)


@pytest.mark.parametrize("c", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("m", COUNTS)
def test_cagrad_is_the_papers_by_scipy(m: int, c: float) -> None:
    for seed, options in ((0, {}), (1, {"preference": preference_of(m)})):
        rows = jacobian(m, seed, spread=0.5)
        preference = np.array(options.get("preference", [1 / m] * m))
        p = cagrad_by_slsqp(rows.numpy(), preference, c)
        mean = preference @ rows.numpy()
        mixture = p @ rows.numpy()
        expected = mean + c * np.linalg.norm(mean) / np.linalg.norm(mixture) * mixture
        found = (build("cagrad", c=c, **options)(rows @ rows.T) @ rows).numpy()
        # SLSQP's value is good to 1e-15, so its point to 1e-7 or so of a quadratic, less near a corner.
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4 * np.linalg.norm(expected))

        def worst(direction: np.ndarray, rows: Tensor = rows) -> float:
            return float((rows.numpy() @ direction).min())

        assert worst(found) >= worst(expected) - 1e-9 * np.linalg.norm(expected) ** 2


@pytest.mark.parametrize("c", [0.2, 0.7])
@pytest.mark.parametrize("m", COUNTS)
def test_cagrad_satisfies_the_optimality_conditions(m: int, c: float) -> None:
    """At the distance c ||g_0|| from g_0, and all objectives with p_i > 0 have the least gain."""
    for seed in range(6):
        rows = jacobian(m, seed)
        gram = rows @ rows.T
        weights = build("cagrad", c=c)(gram)
        mean = rows.mean(dim=0)
        direction = weights @ rows
        radius = c * float(mean.norm())
        assert float((direction - mean).norm()) == pytest.approx(radius, rel=1e-9)
        gains = rows @ direction
        size = float(rows.norm(dim=1).max() * direction.norm())
        added = weights - 1 / m
        taking_part = added > 1e-7 * added.max()
        assert bool((added >= -1e-12).all())
        # Of the largest gain that there could be: min-norm points are good to half of the digits.
        assert float((gains[taking_part] - gains.min()).max()) <= 1e-7 * size


def test_cagrad_at_a_stationary_point_takes_the_nearest_direction_that_hurts_nobody() -> None:
    rows = torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    weights = build("cagrad")(rows @ rows.T)
    assert (weights @ rows).tolist() == pytest.approx([0.0, 1 / 3], abs=1e-12)
    tilted = torch.tensor([[1.0, 0.0], [-2.0, 0.0], [0.0, 3.0]], dtype=torch.float64)
    weights = build("cagrad", c=0.9)(tilted @ tilted.T)
    expected = safe_weights(tilted @ tilted.T, torch.full((3,), 1 / 3, dtype=torch.float64))
    torch.testing.assert_close(weights, expected, rtol=1e-12, atol=0)
    assert diagnose(tilted @ tilted.T, weights).hurt == []


def test_cagrad_without_radius_is_the_weighted_sum() -> None:
    rows = jacobian(4, 0)
    for name in ("cagrad", "cagrad_clip"):
        assert build(name, c=0, preference=preference_of(4))(rows @ rows.T).tolist() == pytest.approx(
            preference_of(4), rel=1e-15
        )


@pytest.mark.parametrize("m", COUNTS)
def test_cagrad_clip_cuts_cagrads_mixture_at_the_preference(m: int) -> None:
    for seed in range(4):
        rows = jacobian(m, seed)
        preference = torch.tensor(preference_of(m), dtype=torch.float64)
        options: dict[str, Any] = {"c": 0.4, "preference": preference.tolist()}
        added = build("cagrad", **options)(rows @ rows.T) - preference
        cut = torch.minimum(added / added.sum(), preference)  # the mixture has sum 1
        radius = 0.4 * (preference @ rows).norm()
        expected = preference + radius * cut / (cut @ rows).norm()
        found = build("cagrad_clip", **options)(rows @ rows.T)
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-9 * float(expected.max()))


# -- fairness ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [0.3, 0.5, 1.0, 2.0, 8.0])
@pytest.mark.parametrize("m", [1, *COUNTS])
def test_fairgrad_satisfies_its_equation(m: int, alpha: float) -> None:
    """(G w)_i = (w_i / (M u_i))^(-1/alpha), for gradients of any length."""
    for seed, factor in ((0, 1.0), (1, 3e-4), (2, 7e5)):
        rows = jacobian(m, seed) * factor
        gram = rows @ rows.T
        for preference in (None, preference_of(m)):
            weights = build("fairgrad", alpha=alpha, preference=preference).weigh(gram).proposed
            shares = torch.tensor(preference or [1 / m] * m, dtype=torch.float64) * m
            gains, wanted = gram @ weights, (weights / shares) ** (-1 / alpha)
            assert bool((weights > 0).all())
            # Of the summands: the gains cancel where gradients are opposed. The ridge is 1e-12 of them.
            summands = gram.abs() @ weights
            assert float(((gains - wanted).abs() / summands).max()) < 1e-11


def test_nash_mtl_is_fairgrad_with_alpha_1_before_it_is_shortened() -> None:
    gram = jacobian(4, 0) @ jacobian(4, 0).T
    free = build("nash_mtl", max_norm=None)(gram)
    assert torch.equal(free, build("fairgrad", alpha=1)(gram))
    assert float(free @ gram @ free) == pytest.approx(4.0, rel=1e-10)  # w_i (G w)_i = 1 each
    for limit, length in ((0.3, 0.3), (10.0, 2.0)):
        capped = build("nash_mtl", max_norm=limit)(gram)
        assert float((capped @ gram @ capped).sqrt()) == pytest.approx(length, rel=1e-10)
        torch.testing.assert_close(capped / capped.sum(), free / free.sum(), rtol=1e-12, atol=0)


@pytest.mark.parametrize("name", ["fairgrad", "nash_mtl"])
def test_fair_directions_stand_still_where_nothing_raises_all(name: str) -> None:
    rows = torch.tensor([[1.0, 0.0], [-0.5, 1.0], [-0.5, -2.0]], dtype=torch.float64)
    weights = build(name, scale="mean_norm")(rows @ rows.T)
    # Weights of 1e6 and a Gram matrix rounded to 1e-16: 1e-8 in the norm.
    assert float((weights @ rows).norm()) < 1e-6 * float(rows.norm(dim=1).mean())


@pytest.mark.parametrize("alpha", [0.5, 2.0])
def test_a_fair_direction_is_the_best_of_its_length(alpha: float) -> None:
    """It maximises sum_i u_i <d, g_i>^(1 - alpha) / (1 - alpha): no small turn is better."""
    rows = jacobian(3, 4, spread=0.5)
    preference = torch.tensor([0.2, 0.3, 0.5], dtype=torch.float64)
    weights = build("fairgrad", alpha=alpha, preference=preference.tolist())(rows @ rows.T)
    direction = weights @ rows

    def utility(along: Tensor) -> float:
        gains = rows @ (along / along.norm() * direction.norm())
        return float((preference * gains ** (1 - alpha)).sum() / (1 - alpha))

    generator = torch.Generator().manual_seed(0)
    for _ in range(20):
        turn = torch.randn(rows.shape[1], generator=generator, dtype=torch.float64)
        assert utility(direction + 1e-3 * direction.norm() * turn / turn.norm()) < utility(direction)


# -- others ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("m", COUNTS)
def test_mgda_decoupled_takes_the_coefficients_of_the_divided_gradients(m: int) -> None:
    rows = jacobian(m, 0)
    losses = 10 ** torch.linspace(-2, 2, m, dtype=torch.float64)
    divided = rows / losses[:, None]
    expected = build("mgda")(divided @ divided.T)
    found = build("mgda_decoupled", losses=losses.tolist())(rows @ rows.T)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-9)
    assert torch.equal(build("mgda_decoupled")(rows @ rows.T) > 0, build("mgda")(rows @ rows.T) > 0)


@pytest.mark.parametrize("m", COUNTS)
def test_imtl_g_has_equal_projections_and_aligned_mtl_orthogonal_gradients_of_one_length(m: int) -> None:
    rows = jacobian(m, 1)
    gram = rows @ rows.T
    direction = build("imtl_g", ascend=True)(gram) @ rows
    projections = rows @ direction / rows.norm(dim=1)
    # Independent gradients of condition below 1e4.
    torch.testing.assert_close(projections, projections[:1].expand(m), rtol=1e-8, atol=0)
    assert float(projections[0]) > 0
    units = torch.eye(m).tolist()
    aligned = torch.stack([build("aligned_mtl", preference=unit)(gram) @ rows for unit in units])
    least = float(torch.linalg.svdvals(rows)[-1])
    expected = least**2 * torch.eye(m, dtype=torch.float64)
    torch.testing.assert_close(aligned @ aligned.T, expected, rtol=0, atol=1e-7 * least**2)


@settings(max_examples=80, deadline=None, derandomize=True)
@given(
    st.sampled_from(NON_CONFLICTING),
    st.sampled_from(sorted({*families(2, 0)} - {"denormal gram", "huge gram"})),
    st.integers(2, 8),
    st.integers(0, 50),
)
def test_projections_hurt_nobody(name: str, family: str, m: int, seed: int) -> None:
    rows = families(m, seed)[family]
    gram = rows @ rows.T
    gram = (gram + gram.T) / 2
    for method, options in ((name, {}), ("weighted_sum", {"safe": True}), ("p_gapo", {"safe": True})):
        weights = build(method, **options).weigh(gram).proposed
        summands = weights * gram.diagonal().sqrt()
        change = cosine_matrix(gram) @ summands
        # The matrix is rounded to 1e-16 of its entries.
        assert bool((change >= -1e-11 * summands.abs().sum()).all())


@pytest.mark.parametrize("factor", [1e-300, 1e-200, 1e200, 1e290])
@pytest.mark.every("aggregation")
def test_a_factor_near_the_ends_of_double_precision_changes_no_weight(name: str, factor: float) -> None:
    gram = jacobian(3, 0, spread=1.0) @ jacobian(3, 0, spread=1.0).T
    expected = build(name, scale="mean_norm")(gram)
    found = build(name, scale="mean_norm").weigh(gram * factor)
    assert found.ok()
    # Every product is rounded anew.
    torch.testing.assert_close(found.weights, expected, rtol=0, atol=1e-8 * float(expected.abs().max()))
