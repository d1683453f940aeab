"""Token rewards before, and whitening after, the advantage estimator."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

# Advantages that spread by less than this share of their size are constant up to float32 rounding.
_CONSTANT = 1e-6


def token_rewards(
    scores_MB: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, kl_beta: float
) -> Tensor:
    """Rewards [M, B, T]: ``kl_beta * r^KL_t`` on every response token, the score on the last one too.

    ``r^KL_t = -(log pi(a_t) - log pi_ref(a_t))``, with a plus sign for every objective: the -beta of the
    paper's printed eq. 14 would reward the second objective for leaving the reference. Rows without
    a response token are 0.
    """
    kl_reward_BT = torch.where(mask_BT, ref_logprobs_BT - logprobs_BT, 0.0)
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT, position_T, -1).amax(dim=1)
    is_last_BT = position_T == last_B[:, None]
    return kl_beta * kl_reward_BT + torch.where(is_last_BT, scores_MB[:, :, None], 0.0)


def whiten(advantages_MBT: Tensor, mask_BT: Tensor, sum_over_data: Callable[[Tensor], Tensor]) -> Tensor:
    """Advantages with mean 0 and variance 1 per objective over the response tokens of *all* ranks.

    ``sum_over_data`` sums a tensor over the data-parallel ranks. Off the response the result is 0;
    an objective whose advantages are all equal becomes 0. Whitening rescales ``||g_i||``, which
    GAPO reads: leave it out unless you want that.
    """
    x_MBT = torch.where(mask_BT, advantages_MBT, 0.0).double()
    tokens = sum_over_data(mask_BT.sum().double()).clamp(min=1)
    mean_M = sum_over_data(x_MBT.sum(dim=(1, 2))) / tokens
    centred_MBT = torch.where(mask_BT, x_MBT - mean_M[:, None, None], 0.0)
    # Two passes: E[x^2] - E[x]^2 loses its digits where the mean is large.
    spread_M = (sum_over_data(centred_MBT.square().sum(dim=(1, 2))) / tokens).sqrt()
    constant_M = spread_M <= _CONSTANT * (mean_M.square() + spread_M.square()).sqrt()
    factor_M = torch.where(constant_M, 0.0, 1.0 / torch.where(constant_M, 1.0, spread_M))
    return (centred_MBT * factor_M[:, None, None]).to(advantages_MBT.dtype)
