"""Generalised advantage estimation with a critic (Schulman et al. 2016), per objective."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.types import Experience


def gae(
    token_rewards_MBT: Tensor, values_MBT: Tensor, mask_BT: Tensor, gamma: float, lam: float
) -> tuple[Tensor, Tensor]:
    """Advantages and returns [M, B, T], exactly 0 off the response.

    ``values_MBT[:, :, t]`` is the value before token t is drawn; the value after the last response
    token is 0. ``delta_t = r_t + gamma V_{t+1} - V_t``, ``A_t = delta_t + gamma lam A_{t+1}``, return
    ``A_t + V_t``, where t + 1 is the *next response token*: the recursion skips gaps in the mask.
    """
    advantages_MBT = torch.zeros_like(token_rewards_MBT)
    next_value_MB = torch.zeros_like(token_rewards_MBT[:, :, 0])
    next_advantage_MB = torch.zeros_like(next_value_MB)
    for t in reversed(range(mask_BT.shape[1])):
        mask_B = mask_BT[:, t]
        delta_MB = token_rewards_MBT[:, :, t] + gamma * next_value_MB - values_MBT[:, :, t]
        advantage_MB = delta_MB + gamma * lam * next_advantage_MB
        advantages_MBT[:, :, t] = torch.where(mask_B, advantage_MB, 0.0)
        next_advantage_MB = torch.where(mask_B, advantage_MB, next_advantage_MB)
        next_value_MB = torch.where(mask_B, values_MBT[:, :, t], next_value_MB)
    returns_MBT = torch.where(mask_BT, advantages_MBT + values_MBT, 0.0)
    return advantages_MBT, returns_MBT


def check_share(option: str, value: object) -> None:
    """Raise ``ValueError`` unless it is a number from 0 to 1."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 <= value <= 1:
        raise ValueError(f"{option}: found {value!r}, accepted: a number from 0 to 1")


@dataclass(frozen=True, kw_only=True)
class Gae(AdvantageEstimator):
    """``gamma`` discounts rewards, ``lam`` trades the critic's bias for variance; both in [0, 1]."""

    name: ClassVar[str] = "gae"
    needs_values: ClassVar[bool] = True
    by_token: ClassVar[bool] = True

    gamma: float = 1.0
    lam: float = 0.95

    def __post_init__(self) -> None:
        check_share("gamma", self.gamma)
        check_share("lam", self.lam)

    def __call__(self, experience: Experience) -> Experience:
        if experience.values_MBT is None:
            raise ValueError(
                "values_MBT: found none, accepted: the critic's values, which advantages.name gae needs"
            )
        advantages_MBT, returns_MBT = gae(
            experience.token_rewards_MBT,
            experience.values_MBT,
            experience.response_mask_BT,
            self.gamma,
            self.lam,
        )
        return replace(experience, advantages_MBT=advantages_MBT, returns_MBT=returns_MBT)
