"""Theorems 3.1 to 3.3 on small smooth problems: plain gradient steps of size eta -> 0.

An improvement is J_i(theta + eta d) - J_i(theta) of the real function, not of its linear model, so the
theorems hold up to an error that shrinks in proportion to eta.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import pytest
import torch
from torch import Tensor

from gapo_mega.aggregation import build

Objectives = Callable[[Tensor], Tensor]  # theta -> J [M], to be maximised


def quadratics(m: int, seed: int) -> tuple[Objectives, Tensor]:
    """J_i = -(theta - c_i)' A_i (theta - c_i) / 2 with scales that differ by a factor of 1.5 each."""
    generator = torch.Generator().manual_seed(seed)
    n = 6
    centres = torch.randn(m, n, generator=generator, dtype=torch.float64)
    factors = torch.randn(m, n, n, generator=generator, dtype=torch.float64)
    curvatures = torch.eye(n, dtype=torch.float64) + 0.1 * factors @ factors.transpose(1, 2)
    scales = 1.5 ** torch.arange(m, dtype=torch.float64)

    def value(theta: Tensor) -> Tensor:
        offset = theta - centres
        return -0.5 * scales * torch.einsum("mi,mij,mj->m", offset, curvatures, offset)

    return value, centres.mean(dim=0)


def logistic(m: int, seed: int) -> tuple[Objectives, Tensor]:
    """Log-likelihoods of m labellings of the same points, each a mixture of own and shared labels."""
    generator = torch.Generator().manual_seed(seed)
    n, points = 5, 40
    features = torch.randn(points, n, generator=generator, dtype=torch.float64)
    directions = torch.randn(m, n, generator=generator, dtype=torch.float64)
    labels = torch.sign(directions @ features.T)
    scales = 1.5 ** torch.arange(m, dtype=torch.float64)

    def value(theta: Tensor) -> Tensor:
        return scales * torch.nn.functional.logsigmoid(labels * (features @ theta)).mean(dim=1)

    return value, 0.5 * torch.randn(n, generator=generator, dtype=torch.float64)


PROBLEMS = [
    pytest.param(problem, m, seed, id=f"{problem.__name__}-{m}-{seed}")
    for problem in (quadratics, logistic)
    for m in (2, 3)
    for seed in (0, 2, 3)
]


def jacobian(objectives: Objectives, theta: Tensor) -> Tensor:
    """The gradients [M, n]."""
    rows: Tensor = torch.autograd.functional.jacobian(objectives, theta)
    return rows


def interior_points(
    objectives: Objectives, theta: Tensor, p: float, count: int = 3, tries: int = 200
) -> list[tuple[Tensor, Tensor, Tensor]]:
    """(theta, gradients, weights) along a GAPO(p) trajectory, where all weights are well above 0."""
    found = []
    generator = torch.Generator().manual_seed(0)
    start = theta
    for attempt in range(tries):
        rows = jacobian(objectives, theta)
        weights = build("gapo", p=p)(rows @ rows.T)
        shares = weights * rows.norm(dim=1)
        direction = weights @ rows
        if float(shares.min()) > 0.05 * float(shares.max()) and float(direction.norm()) > 0.05 * float(
            shares.sum()
        ):
            found.append((theta, rows, weights))
            if len(found) == count:
                break
            theta = theta + 0.05 * direction / rows.norm(dim=1).max()
        else:
            radius = 0.5 + attempt / tries
            theta = start + radius * torch.randn(start.shape, generator=generator, dtype=torch.float64)
    return found


def ratio_error(
    objectives: Objectives, theta: Tensor, direction: Tensor, expected: Tensor, eta: float
) -> float:
    """Largest relative error of the improvements against ``expected``, up to a common factor."""
    gain = (objectives(theta + eta * direction) - objectives(theta)) / expected
    return float((gain / gain.mean() - 1.0).abs().max())


def assert_error_vanishes_in_proportion_to_eta(
    objectives: Objectives, theta: Tensor, direction: Tensor, expected: Tensor
) -> None:
    direction = direction / direction.norm()
    errors = [ratio_error(objectives, theta, direction, expected, eta) for eta in (1e-3, 1e-4, 1e-5)]
    # First order: a tenth of the step, a tenth of the error. The second-order term of a step of 1e-3 is
    # some 1e-3 of the first-order one, and float64 leaves 1e-11 of a difference of size 1e-5.
    for coarse, fine in pairwise(errors):
        assert 0.07 < fine / coarse < 0.14, errors
    assert errors[-1] < 1e-3, errors


@pytest.mark.parametrize(("problem", "m", "seed"), PROBLEMS)
def test_theorem_3_1_mgda_improves_all_objectives_by_the_same_amount(
    problem: Callable[[int, int], tuple[Objectives, Tensor]], m: int, seed: int
) -> None:
    objectives, start = problem(m, seed)
    points = interior_points(objectives, start, p=0.0)
    assert points
    for theta, rows, _ in points:
        direction = build("mgda")(rows @ rows.T) @ rows
        assert_error_vanishes_in_proportion_to_eta(objectives, theta, direction, torch.ones(m).double())


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize(("problem", "m", "seed"), PROBLEMS)
def test_theorem_3_3_gapo_improves_in_the_ratio_of_the_norms_to_the_p(
    problem: Callable[[int, int], tuple[Objectives, Tensor]], m: int, seed: int, p: float
) -> None:
    objectives, start = problem(m, seed)
    points = interior_points(objectives, start, p)
    assert points
    for theta, rows, weights in points:
        expected = rows.norm(dim=1) ** p
        assert_error_vanishes_in_proportion_to_eta(objectives, theta, weights @ rows, expected)


@pytest.mark.parametrize("p", [0.0, 1.0, 2.0])
@pytest.mark.parametrize(("problem", "m", "seed"), PROBLEMS)
def test_theorem_3_2_small_steps_improve_every_objective_until_pareto_stationary(
    problem: Callable[[int, int], tuple[Objectives, Tensor]], m: int, seed: int, p: float
) -> None:
    objectives, theta = problem(m, seed)
    for _ in range(50):
        rows = jacobian(objectives, theta)
        weights = build("gapo", p=p, scale="mean_norm")(rows @ rows.T)
        direction = weights @ rows
        if float(direction.norm()) < 0.02 * float(rows.norm(dim=1).mean()):
            break  # next to a Pareto stationary point a step of this size may pass it
        moved = theta + 1e-3 * direction
        assert bool((objectives(moved) > objectives(theta)).all())
        theta = theta + 0.05 * direction / float(rows.norm(dim=1).mean())


def test_the_smallest_gradient_dictates_mgdas_step_and_not_gapos() -> None:
    """What follows from the theorems: shrinking one objective slows MGDA for all, not GAPO(p = 1)."""
    rows = torch.tensor([[1.0, 0.0], [0.0, 1.0]], dtype=torch.float64)
    small = rows * torch.tensor([[1.0], [1e-3]], dtype=torch.float64)

    def gain_of_first(name: str, gradients: Tensor) -> float:
        return float(gradients[0] @ (build(name)(gradients @ gradients.T) @ gradients))

    assert gain_of_first("mgda", small) < 1e-5 * gain_of_first("mgda", rows)
    assert gain_of_first("gapo", small) == pytest.approx(gain_of_first("gapo", rows), rel=1e-12)
