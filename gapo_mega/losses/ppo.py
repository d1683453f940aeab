"""The clipped policy loss of PPO (Schulman et al. 2017, eq. 7; GAPO paper, eqs. 15 and 16)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.losses.base import PolicyLoss
from gapo_mega.types import Experience

# exp(80) is about the largest ratio that float32 holds with room to multiply it by an advantage. An
# infinite ratio would turn the gradient of a *clipped* token into 0 * inf = NaN.
_LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class PolicyStatistics:
    """Sums over response tokens, to add up over microbatches and ranks before dividing."""

    clipped: Tensor  # tokens where the clipped term is the smaller one, so that they give no gradient
    kl: Tensor  # estimate of KL(old || new), nats
    tokens: Tensor


@dataclass(frozen=True, kw_only=True)
class Ppo(PolicyLoss):
    """``-min(rho A, clip(rho, 1 - eps, 1 + eps) A)``, rho = pi / pi_old, eps = ``clip_epsilon`` > 0."""

    name: ClassVar[str] = "ppo"

    clip_epsilon: float = 0.1

    def __post_init__(self) -> None:
        value = self.clip_epsilon
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < math.inf:
            raise ValueError(f"clip_epsilon: found {value!r}, accepted: a finite number > 0")

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        ratio_BT = _log_ratio(logprobs_BT, batch).exp()
        advantages_BT = _advantages(batch, objective)
        clipped_BT = ratio_BT.clamp(1.0 - self.clip_epsilon, 1.0 + self.clip_epsilon)
        return -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT).sum()

    @torch.no_grad()
    def statistics(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> PolicyStatistics:
        """How far the policy has moved from the one that sampled, over the response tokens.

        The KL estimate is ``rho - 1 - log rho``, unbiased under the old policy and never negative.
        """
        log_ratio_BT = _log_ratio(logprobs_BT, batch)
        ratio_BT = log_ratio_BT.exp()
        advantages_BT = _advantages(batch, objective)
        too_high_BT = (ratio_BT > 1.0 + self.clip_epsilon) & (advantages_BT > 0)
        too_low_BT = (ratio_BT < 1.0 - self.clip_epsilon) & (advantages_BT < 0)
        return PolicyStatistics(
            clipped=(too_high_BT | too_low_BT).sum(),
            kl=(torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
            tokens=batch.response_mask_BT.sum(),
        )


def _advantages(batch: Experience, objective: int) -> Tensor:
    assert batch.advantages_MBT is not None
    return torch.where(batch.response_mask_BT, batch.advantages_MBT[objective], 0.0)


def _log_ratio(logprobs_BT: Tensor, batch: Experience) -> Tensor:
    # Masked before the exponential: torch.where afterwards would let 0 * inf into the gradient.
    difference_BT = logprobs_BT - batch.old_logprobs_BT
    return torch.where(batch.response_mask_BT, difference_BT, 0.0).clamp(max=_LARGEST_LOG_RATIO)
