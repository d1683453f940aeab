"""REINFORCE++ (Hu et al. 2025, arXiv 2501.03262): no critic and no group, one normalisation for the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.gae import check_share, gae
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class ReinforcePp(AdvantageEstimator):
    """Discounted rewards to go, ``G_t = r_t + gamma G_{t+1}``, whitened over the tokens of all ranks.

    ``r_t`` is the KL reward of a token and, at the last one, the score too. Each objective is whitened by
    itself, as ``advantages.whiten`` does it: so its gradient does not tell how far its scores spread.
    ``gamma``: from 0 to 1. ``returns_MBT`` holds G. A single sample of a prompt is enough.
    """

    name: ClassVar[str] = "reinforce_pp"
    whitens: ClassVar[bool] = True
    by_token: ClassVar[bool] = True

    gamma: float = 1.0

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)

    def __call__(self, experience: Experience) -> Experience:
        rewards_MBT = experience.token_rewards_MBT
        returns_MBT, _ = gae(
            rewards_MBT, torch.zeros_like(rewards_MBT), experience.response_mask_BT, self.gamma, 1.0
        )
        return replace(experience, advantages_MBT=returns_MBT, returns_MBT=returns_MBT.clone())
