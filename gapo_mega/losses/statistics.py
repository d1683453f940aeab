"""How far a policy has moved from the one that sampled: what the log says of an update."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.losses.base import AnyLoss, PolicyLoss, clips_of
from gapo_mega.losses.ratio import LARGEST_LOG_RATIO, log_ratio_of
from gapo_mega.types import Experience


@dataclass(frozen=True)
class PolicyStatistics:
    """Over the response tokens of a microbatch: sums float64, to add up before dividing, and extremes."""

    clipped_MC: Tensor  # tokens that a bound holds back, for each objective and each of the loss's ``clips``
    kl: Tensor  # of the estimate ``rho - 1 - log rho`` of KL(old || new), nats
    surprisal: Tensor  # of ``-log pi``, whose mean estimates the entropy
    tokens: Tensor
    least_log_ratio: Tensor  # Inf without a token
    greatest_log_ratio: Tensor  # -Inf without a token


@torch.no_grad()
def policy_statistics(
    loss: AnyLoss, logprobs_BT: Tensor, batch: Experience, objectives: int
) -> PolicyStatistics:
    """Measure one microbatch. ``rho - 1 - log rho`` is unbiased under the old policy and never negative."""
    mask_BT = batch.response_mask_BT
    log_ratio_BT = log_ratio_of(logprobs_BT, batch).double().clamp(max=LARGEST_LOG_RATIO)
    clipped_MC = log_ratio_BT.new_zeros(objectives, len(clips_of(loss)))
    if isinstance(loss, PolicyLoss) and loss.clips:
        masks = [loss.clipped(logprobs_BT, batch, k) & mask_BT for k in range(objectives)]
        clipped_MC = torch.stack([mask.sum(dim=(1, 2)) for mask in masks]).double()
    return PolicyStatistics(
        clipped_MC=clipped_MC,
        kl=(torch.expm1(log_ratio_BT) - log_ratio_BT).sum(),
        surprisal=-torch.where(mask_BT, logprobs_BT, 0.0).double().sum(),
        tokens=mask_BT.sum().double(),
        least_log_ratio=torch.where(mask_BT, log_ratio_BT, torch.inf).amin(),
        greatest_log_ratio=torch.where(mask_BT, log_ratio_BT, -torch.inf).amax(),
    )
