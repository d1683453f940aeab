"""Training in the test bed: its parts against independent arithmetic, and outcomes that are known."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from benchmarks.testbed.front import Front
from benchmarks.testbed.methods import METHODS, Method, Setting
from benchmarks.testbed.problem import BETA, Problem, objective_gradients
from benchmarks.testbed.regimes import REGIMES
from benchmarks.testbed.signal import Batch, Signal
from benchmarks.testbed.training import SAMPLES, Adam, Sampler, hurts, train
from gapo_mega import aggregation

# Those whose direction hurts nobody to first order, whatever the gradients are.
SAFE = {
    "gapo": {},
    "mgda": {},
    "upgrad": {},
    "dual_proj": {},
    "fairgrad": {},
    "p_gapo": {"safe": True},
    "tchebycheff_safe": {},
    "weighted_sum": {"safe": True},
}
PROMPTS = 8
EUCLIDEAN = np.ones((2, 64))  # a metric [N, D] that nobody asked for


@pytest.fixture(scope="module")
def problems() -> dict[str, Problem]:
    return {name: Problem(REGIMES[name], (0, 1)) for name in ("benign", "scales", "kinds3", "majority")}


def exact_scores_gradients(problem: Problem, theta_SD: np.ndarray) -> np.ndarray:
    """Of the J_i in the units of the scores [S, M, D]."""
    return objective_gradients(problem.gradients(theta_SD)) * problem.scales_M[:, None]


def objectives(problem: Problem, theta_SD: np.ndarray) -> np.ndarray:
    """J [S, M]."""
    rewards, kl = problem.values(problem.log_probabilities(theta_SD))
    return rewards - BETA * kl[:, None]


def climbed(problem: Problem, name: str, options: dict, steps: int = 25) -> np.ndarray:
    """The J after each of some short steps along exact gradients, combined by the method [T, S, M]."""
    aggregators = [aggregation.build(name, **options) for _ in range(problem.count)]
    theta_SD = np.zeros((problem.count, problem.dimensions))
    reached = [objectives(problem, theta_SD)]
    for _ in range(steps):
        exact_SMD = torch.from_numpy(exact_scores_gradients(problem, theta_SD))
        for s, (aggregator, rows_MD) in enumerate(zip(aggregators, exact_SMD, strict=True)):
            direction_D = (aggregator(rows_MD @ rows_MD.T) @ rows_MD).numpy()
            theta_SD[s] += 0.02 * direction_D / np.linalg.norm(direction_D)
        reached.append(objectives(problem, theta_SD))
    return np.array(reached)


@pytest.mark.parametrize("regime", ["scales", "kinds3", "majority"])
@pytest.mark.parametrize("name", list(SAFE))
def test_with_exact_gradients_safe_methods_hurt_nobody(problems, name, regime):
    """A step of length 0.02 loses at most a second-order term, and values are sums in fp32."""
    changes = np.diff(climbed(problems[regime], name, SAFE[name]), axis=0)
    assert changes.min() > -2e-4
    assert changes.sum(0).min() > -1e-3


def test_with_exact_gradients_a_weighted_sum_hurts_the_smaller_scales(problems):
    """It climbs the objective whose scores are a thousand times as large, against what the KL costs."""
    reached = climbed(problems["scales"], "weighted_sum", {})[-1]
    beyond = reached - climbed(problems["scales"], "gapo", {})[-1]
    assert reached[:, :2].min() < -0.01
    assert beyond[:, 2].min() > 0.02
    assert beyond[:, :2].max() < -0.02


def test_adam_is_torch_s():
    random = np.random.default_rng(0)
    gradients = random.standard_normal((9, 4, 5)) * 10.0 ** random.integers(-4, 4, (1, 4, 1))
    parameter = torch.zeros(4, 5, dtype=torch.float64, requires_grad=True)
    reference = torch.optim.Adam([parameter], lr=1.0, betas=(0.9, 0.95), eps=1e-30)
    own, theta = Adam((4, 5)), np.zeros((4, 5))
    assert (own.metric_ND == 1).all()
    for gradient in gradients:
        parameter.grad = -torch.from_numpy(gradient)
        reference.step()
        theta = theta + own.step(gradient)
    np.testing.assert_allclose(theta, parameter.detach().numpy(), rtol=1e-10)
    second = reference.state[parameter]["exp_avg_sq"].numpy() / (1 - 0.95**9)
    np.testing.assert_allclose(own.metric_ND, 1 / np.sqrt(second), rtol=1e-10)


def batches(problem: Problem, theta_SCD: np.ndarray, count: int) -> list[Batch]:
    sampler = Sampler(problem, theta_SCD.shape[1], seed=0, prompts=PROMPTS)
    return [sampler.batch(theta_SCD) for _ in range(count)]


def test_samples_estimate_the_exact_gradients(problems):
    """The mean of many batches' weighted sums is the gradient of the sum of the J_i."""
    problem = problems["kinds3"]
    theta_SCD = 0.3 * np.random.default_rng(5).standard_normal((2, 1, problem.dimensions))
    method = METHODS["weighted_sum"]
    signal = signal_of(problem, method, [{}] * 2)
    found = np.array([signal.directions(batch, EUCLIDEAN) for batch in batches(problem, theta_SCD, 400)])
    expected = exact_scores_gradients(problem, theta_SCD[:, 0]).mean(1)
    error = np.linalg.norm(found.mean(0) - expected, axis=1)
    allowed = np.sqrt((found.std(0) ** 2).sum(1) / len(found))
    assert (error < 2 * allowed).all(), (error, allowed)
    assert (allowed < 0.2 * np.linalg.norm(expected, axis=1)).all()  # or it would say nothing


def signal_of(problem: Problem, method: Method, options: list) -> Signal:
    beta = np.full(len(options), BETA)
    return Signal(method, options, beta, problem.scales_M, None, problem.dimensions)


def own_rows(problem: Problem, batch: Batch) -> np.ndarray:
    """Leave-one-out gradients of the J_i from samples, written down anew [N, M, D]."""
    returns = batch.scores_NRM - BETA * problem.scales_M * batch.kl_NR[:, :, None]
    shaped = returns.reshape(len(returns), PROMPTS, SAMPLES, -1)
    others = (shaped.sum(2, keepdims=True) - shaped) / (SAMPLES - 1)
    advantages = (shaped - others).reshape(returns.shape)
    return np.einsum("nrm,nrd->nmd", advantages, batch.slopes_NRD) / (PROMPTS * SAMPLES)


@pytest.mark.parametrize("name", ["gapo_adam", "gapo_adam_averaged"])
def test_weights_in_adams_metric_are_those_of_gradients_scaled_by_its_root(problems, name):
    problem = problems["majority"]
    theta_SCD = np.zeros((2, 1, problem.dimensions))
    signal, means = signal_of(problem, METHODS[name], [{}] * 2), np.zeros((2, 3, problem.dimensions))
    for step, batch in enumerate(batches(problem, theta_SCD, 3)):
        metric_ND = 10.0 ** np.random.default_rng(step).uniform(-2, 2, (2, problem.dimensions))
        found, rows = signal.directions(batch, metric_ND), own_rows(problem, batch)
        means = METHODS[name].average * means + (1 - METHODS[name].average) * rows
        for direction, row, mean, metric in zip(found, rows, means, metric_ND, strict=True):
            scaled = torch.from_numpy(mean / (1 - METHODS[name].average ** (step + 1)) * np.sqrt(metric))
            weights = aggregation.build("gapo")(scaled @ scaled.T).numpy()
            np.testing.assert_allclose(direction, weights @ row, rtol=1e-4, atol=1e-5 * abs(row).max())


def test_a_method_is_told_by_what_changes_what_it_does():
    plain = METHODS["gapo"]
    assert replace(plain, label="other").described() == plain.described()
    told = [replace(plain, **{field: value}).described() for field, value in
            (("prompts", 2), ("metric", "adam"), ("average", 0.5), ("options", {"p": 2}))]  # fmt: skip
    assert len({plain.described(), *told}) == 5


def test_weights_come_from_means_of_rows_and_go_to_the_current_ones(problems):
    problem = problems["majority"]
    theta_SCD = np.zeros((2, 1, problem.dimensions))
    signal = signal_of(problem, METHODS["gapo_averaged"], [{}] * 2)
    means, method = np.zeros((2, 3, problem.dimensions)), aggregation.build("gapo")
    for step, batch in enumerate(batches(problem, theta_SCD, 4)):
        found, rows = signal.directions(batch, EUCLIDEAN), own_rows(problem, batch)
        means = 0.9 * means + 0.1 * rows
        unbiased = means / (1 - 0.9 ** (step + 1))
        for n in range(2):
            weights = method(torch.from_numpy(unbiased[n] @ unbiased[n].T)).numpy()
            # Rows and means are fp32.
            np.testing.assert_allclose(
                found[n], weights @ rows[n], rtol=1e-3, atol=1e-5 * np.abs(found).max()
            )


def test_with_the_kl_apart_the_method_sees_rewards_alone(problems):
    problem = problems["benign"]
    theta_SCD = 0.3 * np.random.default_rng(6).standard_normal((2, 1, problem.dimensions))
    (batch,) = batches(problem, theta_SCD, 1)
    found = signal_of(problem, METHODS["gapo_apart"], [{}] * 2).directions(batch, EUCLIDEAN)
    without = own_rows(problem, replace(batch, kl_NR=np.zeros_like(batch.kl_NR)))
    together = own_rows(problem, batch)
    kl = (together - without).mean(1) / BETA
    for n in range(2):
        weights = aggregation.build("gapo")(torch.from_numpy(without[n] @ without[n].T)).numpy()
        expected = weights @ without[n] + BETA * weights.sum() * kl[n]
        np.testing.assert_allclose(found[n], expected, rtol=1e-3, atol=1e-5 * np.abs(expected).max())


def test_every_method_trains_and_none_sees_another_s_instance(problems):
    """Two instances together go where the first goes alone."""
    alone = Problem(REGIMES["kinds3"], (0,))
    for name, method in METHODS.items():
        setting = next(method.settings([0.02]))
        # Random numbers are drawn for all instances at once: compare the first steps of the first instance.
        own = train(alone, Front(alone), method, [setting], steps=2).gains_SCM[0, 0]
        both = train(alone, Front(alone), method, [setting, setting], steps=2).gains_SCM[0]
        assert np.isfinite(own).all(), name
        np.testing.assert_allclose(both, np.stack([own, own]), rtol=1e-3, atol=1e-5, err_msg=name)


def test_scales_ruin_a_weighted_sum_and_nothing_else(problems):
    """Known outcomes with wide margins: 60 steps, sampled gradients."""
    setting = Setting(0.02)

    def worst(regime: str, name: str) -> float:
        problem = problems[regime]
        outcome = train(problem, Front(problem), METHODS[name], [setting], steps=60)
        return float(outcome.gains_SCM.min(-1).mean())

    assert worst("benign", "weighted_sum") > 0.1
    assert worst("scales", "weighted_sum") < -0.02
    for name in ("gdpo", "gapo", "p_gapo"):
        assert worst("scales", name) > 0.05
        assert worst("scales", name) == pytest.approx(worst("benign", name), abs=0.02)


def test_a_step_hurts_whose_exact_value_falls(problems):
    problem = problems["majority"]
    theta_SCD = 0.2 * np.random.default_rng(9).standard_normal((2, 1, problem.dimensions))
    change_SCD = 1e-3 * np.random.default_rng(10).standard_normal(theta_SCD.shape)
    fell = objectives(problem, (theta_SCD + change_SCD)[:, 0]) < objectives(problem, theta_SCD[:, 0])
    assert np.array_equal(hurts(problem, theta_SCD, change_SCD)[:, 0] > 0, fell)
    assert fell.any() and not fell.all()


def test_traces_begin_at_the_start_and_end_at_the_end(problems):
    problem = problems["benign"]
    outcome = train(
        problem, Front(problem), METHODS["gapo"], [Setting(0.02)], steps=5, trace_every=2, probe_every=2
    )
    assert outcome.trace_TSCM.shape == (4, 2, 1, 3)
    np.testing.assert_allclose(outcome.trace_TSCM[0], 0, atol=1e-6)
    assert np.array_equal(outcome.trace_TSCM[-1], outcome.gains_SCM)
    assert ((outcome.hurt_SCM >= 0) & (outcome.hurt_SCM <= outcome.hurt_SC[..., None])).all()
