"""The true front: against solvers that know nothing of its closed form."""

from __future__ import annotations

import moocore
import numpy as np
import pytest
from scipy.optimize import minimize

from benchmarks.testbed.front import Front, hypervolume
from benchmarks.testbed.problem import BETA, Problem, objective_gradients
from benchmarks.testbed.regimes import REGIMES

NAMES = ("benign", "kinds2", "saturating", "majority")


@pytest.fixture(scope="module")
def fronts() -> dict[str, tuple[Problem, Front]]:
    problems = {name: Problem(REGIMES[name], (0, 1)) for name in NAMES}
    return {name: (problem, Front(problem)) for name, problem in problems.items()}


@pytest.mark.parametrize("name", NAMES)
def test_the_closed_form_is_the_best_that_a_solver_finds(fronts, name):
    """L-BFGS over the parameters of the policy, on the exact values and gradients."""
    problem, front = fronts[name]
    weights = np.random.default_rng(3).dirichlet(np.ones(problem.regime.count))
    expected = front.best(0, weights)
    per_objective = weights / front.alone_SM[0]

    def loss(theta_D: np.ndarray) -> tuple[float, np.ndarray]:
        theta_SD = np.stack([theta_D, theta_D])
        rewards, kl = problem.values(problem.log_probabilities(theta_SD))
        gradient = objective_gradients(problem.gradients(theta_SD))[0]
        return -float(per_objective @ (rewards[0] - BETA * kl[0])), -(per_objective @ gradient)

    solved = minimize(loss, np.zeros(problem.dimensions), jac=True, method="L-BFGS-B")
    # The solver stops where fp32 gradients say no more.
    assert -solved.fun == pytest.approx(expected.value, rel=2e-4)
    assert -solved.fun <= expected.value * (1 + 1e-5)
    theta_SD = np.stack([solved.x, solved.x])
    reached = front.gains(*problem.values(problem.log_probabilities(theta_SD)))[0]
    np.testing.assert_allclose(reached, expected.gains_M, atol=0.02)
    assert weights @ expected.gains_M == pytest.approx(expected.value, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_points_of_the_front_are_not_dominated(fronts, name):
    _, front = fronts[name]
    points = front.sample(0, 60)
    assert moocore.is_nondominated(points, maximise=True, keep_weakly=True).all()
    # Nor by anything else: each is the best there is for some weights.
    assert max(front.distance(0, point) for point in points[::6]) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_gains_are_0_at_the_start_and_1_alone(fronts, name):
    problem, front = fronts[name]
    start = front.gains(*problem.values(problem.log_start_SXY.astype(np.float64)))
    np.testing.assert_allclose(start, 0.0, atol=1e-6)
    for i, weights in enumerate(np.eye(problem.regime.count)):
        assert front.best(1, weights).gains_M[i] == pytest.approx(1.0, rel=1e-9)


@pytest.mark.parametrize("name", NAMES)
def test_what_is_possible_is_found_by_a_finer_grid(fronts, name):
    """The best worst gain: no point of a dense front beats it, and one comes close."""
    _, front = fronts[name]
    possible = front.possible[0]
    worst = front.sample(0, 400).min(1).max()
    assert worst <= possible.value + 1e-6
    assert worst > possible.value - 0.02
    # Where all objectives bind, all gains are alike.
    np.testing.assert_allclose(possible.gains_M, possible.value, atol=2e-3)
    start = np.zeros(len(possible.gains_M))
    assert front.distance(0, start) == pytest.approx(possible.value, rel=1e-9)


def test_distance_is_what_all_can_still_gain(fronts):
    _, front = fronts["kinds2"]
    point = front.sample(0, 8)[3]
    assert front.distance(0, point - 0.05) == pytest.approx(0.05, abs=1e-6)
    assert front.distance(0, point + 0.05) == 0.0


def test_hypervolume_counts_what_is_better_for_all():
    assert hypervolume(np.array([[0.5, 0.2], [0.2, 0.5]])) == pytest.approx(0.16)
    assert hypervolume(np.array([[0.9, -0.1], [0.0, 0.5]])) == 0.0
