"""The ratio of the policy to the one that sampled, and what losses with bounds on it share."""

from __future__ import annotations

from dataclasses import dataclass
from typing import get_args

import torch
from torch import Tensor

from gapo_mega.losses.base import PolicyLoss
from gapo_mega.losses.normalization import Normalization
from gapo_mega.option_checks import require_choice, require_number
from gapo_mega.types import Experience

# exp(80) is about the largest ratio that float32 holds with room to multiply it by an advantage. An
# infinite ratio would turn the gradient of a *clipped* token into 0 * inf = NaN.
LARGEST_LOG_RATIO = 80.0


def advantages_of(batch: Experience, objective: int) -> Tensor:
    """Of one objective [B, T], 0 off the response."""
    assert batch.advantages_MBT is not None
    return torch.where(batch.response_mask_BT, batch.advantages_MBT[objective], 0.0)


def log_ratio_of(logprobs_BT: Tensor, batch: Experience) -> Tensor:
    """``log pi - log pi_old`` [B, T], 0 off the response."""
    # Masked before any exponential: torch.where afterwards would let 0 * inf into the gradient.
    return torch.where(batch.response_mask_BT, logprobs_BT - batch.old_logprobs_BT, 0.0)


def ratio_of(log_ratio: Tensor) -> Tensor:
    """Its exponential, finite."""
    return log_ratio.clamp(max=LARGEST_LOG_RATIO).exp()


@dataclass(frozen=True, kw_only=True)
class Clipped(PolicyLoss):
    """Options of a loss that keeps a ratio between ``1 - clip_epsilon`` and ``1 + clip_epsilon_high``.

    ``clip_epsilon_high``: none stands for ``clip_epsilon``. ``normalization``: see ``normalization.divisor``.
    """

    clip_epsilon: float = 0.1
    clip_epsilon_high: float | None = None
    normalization: Normalization = "token_mean"

    def __post_init__(self) -> None:
        require_number("clip_epsilon", self.clip_epsilon, 0, above=True)
        if self.clip_epsilon_high is not None:
            require_number("clip_epsilon_high", self.clip_epsilon_high, 0, above=True)
        require_choice("normalization", self.normalization, get_args(Normalization))

    @property
    def bounds(self) -> tuple[float, float]:
        """The least and the greatest ratio that count."""
        high = self.clip_epsilon if self.clip_epsilon_high is None else self.clip_epsilon_high
        return 1.0 - self.clip_epsilon, 1.0 + high

    @property
    def clips(self) -> tuple[str, ...]:
        return ("low", "high")

    def surrogate(self, ratio_BT: Tensor, advantages_BT: Tensor) -> Tensor:
        """``-min(rho A, clip(rho) A)``: pessimistic, so only a ratio that has gone too far is held."""
        low, high = self.bounds
        clipped_BT = ratio_BT.clamp(low, high)
        return -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT)

    def held(self, ratio_BT: Tensor, advantages_BT: Tensor) -> list[Tensor]:
        """Where ``surrogate`` has no gradient: below the lower bound, and above the upper one."""
        low, high = self.bounds
        return [(ratio_BT < low) & (advantages_BT < 0), (ratio_BT > high) & (advantages_BT > 0)]
