"""RLOO, GRPO, REINFORCE++ and ReMax against NumPy."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.advantages import build, token_rewards, whiten
from gapo_mega.advantages.rewards import kl_rewards
from gapo_mega.types import Experience

M, B, T = 2, 6, 9


def experience(seed: int, beta: float = 0.1) -> Experience:
    """Scores with token rewards and KL rewards that belong to them; the last row has no response."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    for b, (start, end) in enumerate([(2, 7), (1, 9), (3, 4), (2, 9), (4, 8), (5, 5)]):
        mask_BT[b, start:end] = True
    old_BT, ref_BT, scores_MB = normal(B, T), normal(B, T), normal(M, B)
    return Experience(
        tokens_BT=torch.zeros(B, T, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.tensor([4, 1, 4, 1, 1, 4]),
        old_logprobs_BT=old_BT,
        ref_logprobs_BT=ref_BT,
        scores_MB=scores_MB,
        token_rewards_MBT=token_rewards(scores_MB, old_BT, ref_BT, mask_BT, beta),
        kl_rewards_BT=kl_rewards(old_BT, ref_BT, mask_BT, beta),
        greedy_scores_MB=normal(M, B),
    )


def found(name: str, case: Experience, **options: Any) -> tuple[np.ndarray, np.ndarray]:
    result = build(name, **options)(case)
    assert result.advantages_MBT is not None and result.returns_MBT is not None
    return result.advantages_MBT.numpy(), result.returns_MBT.numpy()


def test_rloo_is_against_the_mean_of_the_others() -> None:
    case = experience(1)
    advantages, returns = found("rloo", case)
    total = case.token_rewards_MBT.numpy().sum(axis=2)
    group = case.group_B.numpy()
    for b in range(B):
        others = (group == group[b]) & (np.arange(B) != b)
        expected = total[:, b] - total[:, others].mean(axis=1)
        inside = case.response_mask_BT[b].numpy()
        # float64: a few additions
        assert advantages[:, b, inside] == pytest.approx(np.tile(expected[:, None], inside.sum()), rel=1e-12)
    assert returns.max(axis=2)[:, 0] == pytest.approx(np.maximum(total[:, 0], 0), rel=1e-12)


@pytest.mark.parametrize("options", [{}, {"epsilon": 0.3}, {"normalize": False}])
def test_grpo_is_against_mean_and_spread(options: dict[str, Any]) -> None:
    case = experience(2, beta=0.0)
    advantages, _ = found("grpo", case, **options)
    has_tokens = case.response_mask_BT.any(dim=1).numpy()
    score = np.where(has_tokens, case.scores_MB.numpy(), 0.0)
    group = case.group_B.numpy()
    for b in range(B):
        own = score[:, group == group[b]]
        expected = score[:, b] - own.mean(axis=1)
        if options.get("normalize", True):
            expected /= own.std(axis=1, ddof=1) + options.get("epsilon", 1e-4)
        inside = case.response_mask_BT[b].numpy()
        # float64: a few additions
        assert advantages[:, b, inside] == pytest.approx(np.tile(expected[:, None], inside.sum()), rel=1e-12)


@pytest.mark.parametrize("gamma", [1.0, 0.9, 0.0])
def test_reinforce_pp_is_the_discounted_reward_to_go(gamma: float) -> None:
    case = experience(3)
    advantages, returns = found("reinforce_pp", case, gamma=gamma)
    rewards = case.token_rewards_MBT.numpy()
    expected = np.zeros_like(rewards)
    for b in range(B):
        inside = case.response_mask_BT[b].numpy().nonzero()[0]
        for t in inside:
            later = inside[inside >= t]
            expected[:, b, t] = (rewards[:, b, later] * gamma ** (later - t)).sum(axis=1)
    # float64: up to 8 terms in another order
    assert returns == pytest.approx(expected, rel=1e-12, abs=1e-15)
    assert advantages == pytest.approx(returns, rel=0)
    assert build("reinforce_pp").whitens and build("reinforce_pp").by_token
    whitened = whiten(torch.from_numpy(advantages), case.response_mask_BT, lambda x: x).numpy()
    tokens = expected[:, case.response_mask_BT.numpy()]
    scaled = (tokens - tokens.mean(axis=1, keepdims=True)) / tokens.std(axis=1, keepdims=True)
    # 1e-8 is added to the variance
    assert whitened[:, case.response_mask_BT.numpy()] == pytest.approx(scaled, rel=1e-6, abs=1e-7)


@pytest.mark.parametrize("with_kl", [True, False])
def test_remax_is_against_the_greedy_score(with_kl: bool) -> None:
    case = experience(4, beta=0.2)
    if not with_kl:  # an experience of somebody else's
        case = replace(case, kl_rewards_BT=None)
    advantages, returns = found("remax", case)
    assert case.greedy_scores_MB is not None
    rewards, greedy = case.token_rewards_MBT.numpy(), case.greedy_scores_MB.numpy()
    inside = case.response_mask_BT.numpy()
    to_go = np.flip(np.flip(rewards, axis=2).cumsum(axis=2), axis=2) * inside
    # float64: up to 8 terms in another order
    assert returns == pytest.approx(to_go, rel=1e-11, abs=1e-13)
    assert advantages == pytest.approx(to_go - greedy[:, :, None] * inside, rel=1e-11, abs=1e-13)


def test_remax_keeps_a_small_kl_reward_beside_a_large_score() -> None:
    case = experience(5, beta=1e-4)
    large = case.scores_MB.float() + 1e6
    small = replace(
        case,
        scores_MB=large,
        greedy_scores_MB=large.clone(),
        token_rewards_MBT=case.token_rewards_MBT.float(),
    )
    advantages, _ = found("remax", small)
    assert case.kl_rewards_BT is not None
    to_go = np.flip(np.flip(case.kl_rewards_BT.numpy(), axis=1).cumsum(axis=1), axis=1)
    expected = np.where(case.response_mask_BT.numpy(), to_go, 0.0)
    assert advantages[0] == pytest.approx(expected, rel=1e-6, abs=1e-12)  # rounded to float32


def test_remax_without_greedy_scores_is_refused() -> None:
    with pytest.raises(ValueError, match=r"greedy_scores_MB: found none.*advantages\.name remax"):
        build("remax")(replace(experience(6), greedy_scores_MB=None))
