"""The clipped policy loss of PPO (Schulman et al. 2017, eq. 7; GAPO paper, eqs. 15 and 16)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.types import Experience

# exp(80) is the last power of ten or so that float32 holds with room for an advantage beside it. An
# infinite ratio would turn the gradient of a *clipped* token into 0 * inf = NaN.
_LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class PolicyStatistics:
    """Sums over response tokens, to be added up over microbatches and ranks before dividing."""

    clipped: Tensor  # tokens on which the clip is what counts, so that they give no gradient
    kl: Tensor  # estimate of KL(old || new), nats
    tokens: Tensor


def policy_loss_sum(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip_epsilon: float
) -> Tensor:
    """Sum over response tokens of ``-min(rho A, clip(rho, 1 - eps, 1 + eps) A)``, rho = pi / pi_old.

    A scalar with a graph to ``logprobs_BT`` [B, T]. Positions where ``mask_BT`` (bool) is False add
    exactly 0 to the loss and to the gradient, whatever they hold, NaN included.
    """
    ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, mask_BT).exp()
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    clipped_BT = ratio_BT.clamp(1.0 - clip_epsilon, 1.0 + clip_epsilon)
    return -torch.minimum(ratio_BT * advantages_BT, clipped_BT * advantages_BT).sum()


def policy_loss_of(logprobs_BT: Tensor, batch: Experience, objective: int, clip_epsilon: float) -> Tensor:
    """``policy_loss_sum`` of one objective's advantages in ``batch``."""
    assert batch.advantages_MBT is not None
    return policy_loss_sum(
        logprobs_BT,
        batch.old_logprobs_BT,
        batch.advantages_MBT[objective],
        batch.response_mask_BT,
        clip_epsilon,
    )


@torch.no_grad()
def policy_statistics(
    logprobs_BT: Tensor, old_logprobs_BT: Tensor, advantages_BT: Tensor, mask_BT: Tensor, clip_epsilon: float
) -> PolicyStatistics:
    """How far the policy has moved from the one that sampled, over the response tokens.

    The KL estimate is ``rho - 1 - log rho``, unbiased under the old policy and never negative.
    """
    log_ratio_BT = _log_ratio(logprobs_BT, old_logprobs_BT, mask_BT)
    ratio_BT = log_ratio_BT.exp()
    advantages_BT = torch.where(mask_BT, advantages_BT, 0.0)
    too_high_BT = (ratio_BT > 1.0 + clip_epsilon) & (advantages_BT > 0)
    too_low_BT = (ratio_BT < 1.0 - clip_epsilon) & (advantages_BT < 0)
    return PolicyStatistics(
        clipped=(too_high_BT | too_low_BT).sum(),
        kl=(torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
        tokens=mask_BT.sum(),
    )


def _log_ratio(logprobs_BT: Tensor, old_logprobs_BT: Tensor, mask_BT: Tensor) -> Tensor:
    # Masked before the exponential: torch.where afterwards would let 0 * inf into the gradient.
    return torch.where(mask_BT, logprobs_BT - old_logprobs_BT, 0.0).clamp(max=_LARGEST_LOG_RATIO)
