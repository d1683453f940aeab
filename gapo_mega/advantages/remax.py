"""ReMax (Li et al. 2024, arXiv 2310.10505): against the score of the greedy response to the same prompt."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.gae import gae
from gapo_mega.advantages.rewards import kl_tokens, score_returns
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class Remax(AdvantageEstimator):
    """``A_t = r - r_greedy + sum_{s >= t} KL reward_s``: one more response to every prompt, and no critic.

    The greedy response has the repetition penalty of the others, and neither temperature nor top-k nor top-p;
    its KL reward does not count, as in verl. ``returns_MBT`` holds ``A_t + r_greedy``.
    """

    name: ClassVar[str] = "remax"
    needs_greedy: ClassVar[bool] = True
    by_token: ClassVar[bool] = True

    def __call__(self, experience: Experience) -> Experience:
        if experience.greedy_scores_MB is None:
            raise ValueError(
                "greedy_scores_MB: found none, accepted: the scores of greedy responses, which "
                "advantages.name remax needs"
            )
        mask_BT, greedy_MB = experience.response_mask_BT, experience.greedy_scores_MB.double()
        # In float64, and the difference of the scores before a small KL reward is added.
        kl_MBT = kl_tokens(experience)
        to_go_MBT, _ = gae(kl_MBT, torch.zeros_like(kl_MBT), mask_BT, gamma=1.0, lam=1.0)
        advantages_MBT = (score_returns(experience) - greedy_MB)[:, :, None] + to_go_MBT
        returns_MBT = score_returns(experience)[:, :, None] + to_go_MBT
        dtype = experience.token_rewards_MBT.dtype
        return replace(
            experience,
            advantages_MBT=torch.where(mask_BT, advantages_MBT, 0.0).to(dtype),
            returns_MBT=torch.where(mask_BT, returns_MBT, 0.0).to(dtype),
        )
