"""The policy of the test bed: its exact gradients against autograd and finite differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from benchmarks.testbed.problem import BETA, CONTEXTS, Problem, objective_gradients
from benchmarks.testbed.regimes import REGIMES

SEEDS = (0, 3)


@pytest.fixture(scope="module")
def problem() -> Problem:
    return Problem(REGIMES["kinds3"], SEEDS)


def values(problem: Problem, instance: int, theta_D: torch.Tensor) -> torch.Tensor:
    """The J_i [M] in float64, written down anew."""
    features, rewards, log_start = (
        torch.from_numpy(part[instance]).double()
        for part in (problem.features_SXYD, problem.rewards_SXYM, problem.log_start_SXY)
    )
    log_pi = (log_start + features @ theta_D).log_softmax(-1)
    kl = (log_pi.exp() * (log_pi - log_start)).sum() / CONTEXTS
    return torch.einsum("xy,xyi->i", log_pi.exp(), rewards) / CONTEXTS - BETA * kl


@pytest.fixture(scope="module")
def theta_SD(problem: Problem) -> np.ndarray:
    return 0.5 * np.random.default_rng(7).standard_normal((len(SEEDS), problem.dimensions))


def test_gradients_are_autograd_s(problem, theta_SD):
    exact_SMD = objective_gradients(problem.gradients(theta_SD))
    for instance, theta_D in enumerate(theta_SD):
        expected = torch.autograd.functional.jacobian(
            lambda theta, instance=instance: values(problem, instance, theta), torch.from_numpy(theta_D)
        ).numpy()
        # The test bed sums 10,000 products in fp32.
        scale = np.linalg.norm(expected, axis=1, keepdims=True)
        assert np.abs(exact_SMD[instance] - expected).max() < 1e-5 * scale.max()


def test_gradients_are_differences_of_values(problem, theta_SD):
    rewards_SM, kl_S = problem.values(problem.log_probabilities(theta_SD))
    direction = np.random.default_rng(8).standard_normal(theta_SD.shape)
    predicted = np.einsum("smd,sd->sm", objective_gradients(problem.gradients(theta_SD)), direction)
    for instance in range(len(SEEDS)):
        theta_D, along = torch.from_numpy(theta_SD[instance]), torch.from_numpy(direction[instance])
        ahead, behind = (values(problem, instance, theta_D + sign * 1e-5 * along) for sign in (1, -1))
        measured = ((ahead - behind) / 2e-5).numpy()
        # Central differences are good to some 1e-9 here; the rest is fp32.
        np.testing.assert_allclose(predicted[instance], measured, atol=1e-5 * np.abs(measured).max())
        here = values(problem, instance, theta_D).numpy()
        np.testing.assert_allclose(rewards_SM[instance] - BETA * kl_S[instance], here, atol=2e-6)


@pytest.mark.parametrize("name", list(REGIMES))
def test_rewards_have_the_units_that_the_page_gives(name):
    """Mean 0 in every context and spread 1 under pi_0, and the kinds' shares."""
    problem = Problem(REGIMES[name], (1,))
    pi = np.exp(problem.log_start_SXY[0].astype(np.float64))
    rewards = problem.rewards_SXYM[0].astype(np.float64)
    assert np.abs(np.einsum("xy,xyi->xi", pi, rewards)).max() < 1e-5
    np.testing.assert_allclose(np.einsum("xy,xyi->i", pi, rewards**2) / CONTEXTS, 1.0, rtol=1e-5)
    for i, kind in enumerate(REGIMES[name].kinds):
        # In every context a rare or a saturating reward has one value that is by far the most common.
        common = [np.isclose(row, np.median(row), atol=1e-6).mean() for row in rewards[..., i]]
        low, high = {"rare": (0.95, 1.0), "saturating": (0.85, 0.98)}.get(kind, (0.0, 0.02))
        assert low <= np.mean(common) <= high, (kind, np.mean(common))


def test_rewards_are_in_the_span_of_the_features():
    """Or the front would be out of the policy's reach."""
    problem = Problem(REGIMES["kinds5"], (2,))
    features = problem.features_SXYD[0].reshape(-1, problem.dimensions).astype(np.float64)
    rewards = problem.rewards_SXYM[0].reshape(len(features), -1).astype(np.float64)
    _, left, _, _ = np.linalg.lstsq(features, rewards, rcond=None)
    assert (left / (rewards**2).sum(0)).max() < 1e-8


def test_conflicts_are_those_of_the_regime():
    correlations = REGIMES["majority"].correlations()
    assert correlations.tolist() == [[1, 0.8, -0.7], [0.8, 1, -0.7], [-0.7, -0.7, 1]]
    rewards = Problem(REGIMES["majority"], (0, 1, 2)).rewards_SXYM.reshape(-1, 3)
    # 30,000 samples, of which half the variance comes in 600 draws.
    np.testing.assert_allclose(np.corrcoef(rewards.T), correlations, atol=0.08)


def test_an_instance_does_not_depend_on_its_company():
    alone, among = Problem(REGIMES["noisy"], (5,)), Problem(REGIMES["noisy"], (4, 5))
    assert np.array_equal(alone.features_SXYD[0], among.features_SXYD[1])
    assert not np.array_equal(among.features_SXYD[0], among.features_SXYD[1])
