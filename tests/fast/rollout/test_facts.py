"""Within-group correlation against numpy."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch

from gapo_mega.rollout.facts import batch_facts, reward_correlation
from gapo_mega.types import Experience, Rollout
from tests.helpers.fake_engine import FakeEngine


def test_correlation_within_groups_is_pearson_of_the_centred_scores() -> None:
    rng = np.random.default_rng(0)
    group = np.repeat([7, 3, 11, 5], 6)
    values = rng.normal(size=(3, 24))
    values[1] -= 0.6 * values[0]
    centred = values.copy()
    for g in np.unique(group):
        centred[:, group == g] -= centred[:, group == g].mean(axis=1, keepdims=True)
    offsets = 100.0 * group  # easy and hard prompts: must not matter
    result = reward_correlation(torch.from_numpy(values + offsets), torch.from_numpy(group))
    # Offsets of 1e3 cost about three digits of float64.
    np.testing.assert_allclose(result.numpy(), np.corrcoef(centred), atol=1e-10)


def test_correlation_of_a_constant_objective_is_nan() -> None:
    values = torch.stack([torch.linspace(0, 1, 8), torch.full((8,), 0.1)])
    result = reward_correlation(values, torch.tensor([0, 0, 0, 0, 1, 1, 1, 1]))
    assert result[0, 0] == pytest.approx(1.0) and torch.isnan(result[0, 1]) and torch.isnan(result[1, 1])


def rollout_and_experience() -> tuple[Rollout, Experience]:
    mask_BT = torch.tensor([[False, True, True], [False, True, False]])
    tokens_BT = torch.arange(6).reshape(2, 3)
    generator_BT = torch.tensor([[9.0, -1.0, -2.0], [9.0, -3.0, 9.0]])  # 9: off the response
    rollout = Rollout(
        prompts=[],
        responses=["", ""],
        group_B=torch.tensor([0, 0]),
        tokens_BT=tokens_BT,
        prompt_lengths_B=torch.tensor([1, 1]),
        response_mask_BT=mask_BT,
        logprobs_BT=generator_BT,
        finished_B=torch.tensor([True, False]),
    )
    experience = Experience(
        tokens_BT=tokens_BT,
        response_mask_BT=mask_BT,
        group_B=rollout.group_B,
        old_logprobs_BT=torch.tensor([[0.0, -1.5, -2.0], [0.0, -2.75, 0.0]]),
        ref_logprobs_BT=torch.zeros(2, 3),
        scores_MB=torch.tensor([[1.0, 2.0]]),
        token_rewards_MBT=torch.zeros(1, 2, 3),
    )
    return rollout, experience


def test_the_difference_of_generator_and_trainer_is_over_response_tokens() -> None:
    rollout, experience = rollout_and_experience()
    facts = batch_facts(FakeEngine(), ["a"], rollout, experience, 2)
    assert facts.extra["logprob_difference/mean"] == pytest.approx((0.5 + 0.0 + 0.25) / 3)
    assert facts.extra["logprob_difference/max"] == 0.5


def test_there_is_no_difference_to_measure_from_the_generator_s_own() -> None:
    rollout, experience = rollout_and_experience()
    same = dataclasses.replace(experience, old_logprobs_BT=rollout.logprobs_BT)
    extra = batch_facts(FakeEngine(), ["a"], rollout, same, 2).extra
    assert not any(name.startswith("logprob_difference") for name in extra)


def test_spreads_are_those_of_numpy_and_exactly_0_where_all_scores_are_alike() -> None:
    rollout, experience = rollout_and_experience()
    tenth = float(torch.tensor(0.1))  # no binary fraction: the mean is rounded
    scores_MB = torch.tensor([[1.0, 2.0], [tenth, tenth], [-(2.0**100), 2.0**100], [1e6, 1e6 + 0.25]])
    facts = batch_facts(
        FakeEngine(), ["a", "b", "c", "d"], rollout, dataclasses.replace(experience, scores_MB=scores_MB), 1
    )
    assert facts.rewards == pytest.approx([1.5, tenth, 0.0, 1e6 + 0.125], rel=1e-14)
    assert facts.spreads[1] == 0.0
    assert facts.spreads == pytest.approx([0.5, 0.0, 2.0**100, 0.125], rel=1e-9)
