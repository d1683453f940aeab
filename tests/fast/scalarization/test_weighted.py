"""Scalarizers that weigh scores: their weights over several batches against formulas by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.scalarization import Weighted, build
from gapo_mega.scalarization.ctwa import within_prompts

GROUP_B = torch.tensor([0, 0, 0, 1, 1, 1])
LENGTHS_B = torch.ones(6, dtype=torch.int64)


def prepared(name: str, objectives: int = 2, **options: object) -> Weighted:
    scalarizer = build(name, **options)
    assert isinstance(scalarizer, Weighted)
    scalarizer.prepare(["helpful", "harmless", "brief"][:objectives])
    return scalarizer


def scores(seed: int, objectives: int = 2) -> Tensor:
    return torch.randn(objectives, 6, generator=torch.Generator().manual_seed(seed))


def test_morlhf() -> None:
    scores_MB = scores(0)
    found_B = prepared("morlhf", preference=[0.25, 0.75])(scores_MB, GROUP_B, LENGTHS_B)
    expected_B = 0.25 * scores_MB[0].double() + 0.75 * scores_MB[1].double()
    torch.testing.assert_close(found_B, expected_B, rtol=1e-15, atol=1e-15)
    # 1/3 as people type it.
    thirds = prepared("morlhf", 3, preference=[0.3333, 0.3333, 0.3333])
    assert thirds.coefficients(scores(0, 3), GROUP_B, LENGTHS_B).tolist() == pytest.approx([1 / 3] * 3)


def advantages(scores_MB: Tensor) -> np.ndarray:
    """Scores less the mean of the two other samples of the prompt, by a loop."""
    found = np.zeros(scores_MB.shape)
    for row, numbers in enumerate(scores_MB.double().numpy()):
        for i, group in enumerate(GROUP_B.tolist()):
            others = [numbers[j] for j in range(6) if j != i and int(GROUP_B[j]) == group]
            found[row, i] = numbers[i] - np.mean(others)
    return found


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("p", [0.0, 1.0, 2.0])
def test_gapo_of_advantages_is_the_shortest_sum_of_rescaled_advantages(seed: int, p: float) -> None:
    """Of two: the projection of the origin on the segment between them, cut to its ends."""
    scores_MB = scores(seed) * torch.tensor([[1.0], [30.0]])
    rows = advantages(scores_MB) / np.sqrt(6)
    first, second = (row / np.linalg.norm(row) ** p for row in rows)
    share = np.clip(second @ (second - first) / ((second - first) @ (second - first)), 0, 1)
    weights = np.array([share, 1 - share]) / np.linalg.norm(rows, axis=1) ** p
    found = prepared("gapo_advantages", p=p).coefficients(scores_MB, GROUP_B, LENGTHS_B)
    np.testing.assert_allclose(found.numpy(), weights / weights.sum(), rtol=1e-9, atol=1e-12)


def test_gapo_of_advantages_leaves_out_an_objective_without_any() -> None:
    scores_MB = torch.cat([scores(0), torch.full((1, 6), 0.1)])
    found = prepared("gapo_advantages", 3).coefficients(scores_MB, GROUP_B, LENGTHS_B).tolist()
    assert found[2] == 0.0 and found[0] > 0 and found[1] > 0
    equal = prepared("gapo_advantages").coefficients(torch.full((2, 6), 0.1), GROUP_B, LENGTHS_B)
    assert equal.tolist() == [0.5, 0.5]


def test_fast_rl_multiplies_weights_by_exponentials_of_means() -> None:
    scalarizer = prepared("fast_rl", rate=0.5)
    weights = np.array([0.5, 0.5])
    for step in range(5):
        scores_MB = scores(step)
        weights = weights * np.exp(-0.5 * scores_MB.double().mean(dim=1).numpy())
        weights /= weights.sum()
        found = scalarizer.coefficients(scores_MB, GROUP_B, LENGTHS_B)
        np.testing.assert_allclose(found.numpy(), weights, rtol=1e-12)
        scalarizer.commit(scores_MB, GROUP_B, LENGTHS_B)


def test_fast_rl_of_huge_scores_stays_finite() -> None:
    scalarizer = prepared("fast_rl", rate=1.0)
    scores_MB = torch.tensor([[3e37] * 6, [-3e37] * 6])
    for _ in range(3):
        assert scalarizer.coefficients(scores_MB, GROUP_B, LENGTHS_B).tolist() == [0.0, 1.0]
        scalarizer.commit(scores_MB, GROUP_B, LENGTHS_B)


def test_safe_rlhf_follows_the_lagrangian() -> None:
    """Against a parameter, its loss and torch's SGD, as in the authors' code; the window slides."""
    options = {"threshold": -0.1, "lambda_lr": 0.7, "window": 8, "delay_steps": 1, "lambda_max": 1.4}
    scalarizer = prepared("safe_rlhf", costs=["harmless"], **options)
    log_lambda = torch.zeros((), dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.SGD([log_lambda], lr=0.7)
    window: list[float] = []
    capped = 0
    for step in range(12):
        scores_MB = scores(step) - torch.tensor([[0.0], [0.4 if step < 6 else -0.8]])
        window = (window + (-scores_MB[1].double()).tolist())[-8:]
        if step >= 1:
            optimizer.zero_grad()
            (-(sum(window) / len(window) + 0.1) * log_lambda.exp()).backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            capped += float(log_lambda.detach()) > math.log(1.4)
            with torch.no_grad():
                log_lambda.clamp_(max=math.log(1.4))
        multiplier = math.exp(float(log_lambda.detach()))
        found = scalarizer.coefficients(scores_MB, GROUP_B, LENGTHS_B).tolist()
        assert found == pytest.approx([1 / (1 + multiplier), multiplier / (1 + multiplier)], rel=1e-12)
        facts = scalarizer.facts(scores_MB, GROUP_B, LENGTHS_B)
        assert facts["lambda/harmless"] == pytest.approx(multiplier, rel=1e-12)
        scalarizer.commit(scores_MB, GROUP_B, LENGTHS_B)
    assert capped and multiplier < 1.3, "the test sees the cap, and steps back from it"


def test_safe_rlhf_with_two_costs_and_one_reward() -> None:
    scalarizer = prepared("safe_rlhf", 3, costs=["brief", "helpful"], lambda_lr=0.0, lambda_init=2.0)
    found = scalarizer.coefficients(scores(0, 3), GROUP_B, LENGTHS_B).tolist()
    assert found == pytest.approx([0.4, 0.2, 0.4])


@pytest.mark.parametrize(
    ("costs", "said"),
    [
        (["harmles"], r"costs: found 'harmles' \(did you mean 'harmless'\?\), accepted: helpful, harmless"),
        (["harmless", "helpful"], "costs: found all 2 objectives, accepted: some of them"),
    ],
)
def test_safe_rlhf_refuses_costs_that_are_no_objectives(costs: list[str], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        prepared("safe_rlhf", costs=costs)


def test_tchebycheff_weighs_what_lags() -> None:
    """The formulas of progress and weights, with units fixed by the first batch."""
    scalarizer = prepared("tchebycheff", mu=0.3, preference=[0.25, 0.75])
    preference = np.array([0.25, 0.75])
    progress, baseline, unit = np.zeros(2), np.zeros(2), np.ones(2)
    for step in range(5):
        scores_MB = scores(step) * torch.tensor([[1.0], [100.0]]) + step * torch.tensor([[0.5], [-10.0]])
        values = scores_MB.double().numpy()
        if step == 0:
            baseline, unit = values.mean(axis=1), values.std(axis=1)
        else:
            progress = 0.9 * progress + 0.1 * (values.mean(axis=1) - baseline) / unit
        weights = preference * np.exp(-progress / 0.3)
        found = scalarizer.coefficients(scores_MB, GROUP_B, LENGTHS_B)
        np.testing.assert_allclose(found.numpy(), weights / weights.sum() / unit, rtol=1e-12)
        facts = scalarizer.facts(scores_MB, GROUP_B, LENGTHS_B)
        assert facts["progress/harmless"] == pytest.approx(progress[1], rel=1e-12, abs=1e-15)
        scalarizer.commit(scores_MB, GROUP_B, LENGTHS_B)
    assert weights[1] / weights[0] > 3, "the objective that has got worse gets the weight"


def test_tchebycheff_does_not_see_the_scales_of_scores() -> None:
    plain, scaled = prepared("tchebycheff"), prepared("tchebycheff")
    factor_M1 = torch.tensor([[1024.0], [0.125]])
    for step in range(4):
        scores_MB = scores(step)
        found_B = plain(scores_MB, GROUP_B, LENGTHS_B)
        torch.testing.assert_close(scaled(scores_MB * factor_M1, GROUP_B, LENGTHS_B), found_B)
        plain.commit(scores_MB, GROUP_B, LENGTHS_B)
        scaled.commit(scores_MB * factor_M1, GROUP_B, LENGTHS_B)


@pytest.mark.parametrize("correlation", [True, False])
def test_ctwa_raises_the_weight_of_what_does_not_vary_with_the_reward(correlation: bool) -> None:
    """Running means and weights by numpy's own covariances; a batch is weighed by those before it."""
    scalarizer = prepared("ctwa", 3, rate=0.5, target=0.4, decay=0.8, correlation=correlation)
    logs, running = np.log(np.full(3, 1 / 3)), np.zeros(3)
    for step in range(6):
        scores_MB = scores(step, 3)
        weights = np.exp(logs) / np.exp(logs).sum()
        found = scalarizer.coefficients(scores_MB, GROUP_B, LENGTHS_B).numpy()
        np.testing.assert_allclose(found, weights, rtol=1e-12)
        scalarizer.commit(scores_MB, GROUP_B, LENGTHS_B)
        values = scores_MB.double().numpy()
        reward = weights @ values
        each = []
        for rows in (slice(0, 3), slice(3, 6)):
            advantage = (reward[rows] - reward[rows].mean()) / (reward[rows].std(ddof=1) + 1e-6)
            if correlation:
                each.append([np.corrcoef(values[k, rows], advantage)[0, 1] for k in range(3)])
            else:
                each.append([np.cov(values[k, rows], advantage, ddof=0)[0, 1] for k in range(3)])
        found_now = np.mean(each, axis=0)
        running = found_now if step == 0 else 0.8 * running + 0.2 * found_now
        logs = logs + 0.5 * np.maximum(0.4 - running, 0)
    assert scalarizer.state_dict()["log_weights"] == pytest.approx(logs.tolist(), rel=1e-9)


def test_a_prompt_without_spread_has_no_correlation() -> None:
    scores_MB = torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 3.0]]).double()
    weights_B = torch.tensor([1.0, 2.0, 3.0, 2.0, 4.0, 6.0]).double()
    found = within_prompts(scores_MB, weights_B, GROUP_B, correlation=True)
    assert found.tolist() == pytest.approx([1.0])
    halved = within_prompts(scores_MB, weights_B, GROUP_B, correlation=False)
    assert halved.tolist() == pytest.approx([4 / 3 / 2])
