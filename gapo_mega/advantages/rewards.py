"""Token rewards before, and whitening after, the advantage estimator."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from gapo_mega.types import Experience

# Advantages that spread by less than this share of their size are constant up to float32 rounding.
_CONSTANT = 1e-6


# Added to the variance by whitening, as in TRL's and verl's masked_whiten.
_VARIANCE_FLOOR = 1e-8


def kl_rewards(logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, kl_beta: float) -> Tensor:
    """``kl_beta * r^KL_t`` [B, T], ``r^KL_t = -(log pi(a_t) - log pi_ref(a_t))``; 0 off the response."""
    if kl_beta == 0:  # 0 times the infinite divergence of a token that the reference rules out
        return torch.zeros_like(logprobs_BT)
    return kl_beta * torch.where(mask_BT, ref_logprobs_BT - logprobs_BT, 0.0)


def token_rewards(
    scores_MB: Tensor, logprobs_BT: Tensor, ref_logprobs_BT: Tensor, mask_BT: Tensor, kl_beta: float
) -> Tensor:
    """Rewards [M, B, T]: ``kl_beta * r^KL_t`` on every response token, the score on the last one too.

    The KL reward has a plus sign for every objective: the -beta of the paper's printed eq. 14 would reward
    the second objective for leaving the reference. Rows without a response token are 0.

    Raises ``ValueError`` where score and KL reward are numbers and their sum is not finite.
    """
    kl_BT = kl_rewards(logprobs_BT, ref_logprobs_BT, mask_BT, kl_beta)
    rewards_MBT = kl_BT + torch.where(_is_last(mask_BT), scores_MB[:, :, None], 0.0)
    wrong_MBT = ~rewards_MBT.isfinite() & ~kl_BT.isnan() & scores_MB.isfinite()[:, :, None]
    if bool(wrong_MBT.any()):
        m, b, t = wrong_MBT.nonzero()[0].tolist()
        raise ValueError(
            f"algorithm.kl_beta: found {kl_beta}, with which the KL reward of token {t} in row {b} is "
            f"{float(kl_BT[b, t])} beside the score {float(scores_MB[m, b])} of objective {m}, "
            f"accepted: a sum that is finite in {rewards_MBT.dtype}"
        )
    return rewards_MBT


def with_scores(experience: Experience, scores_MB: Tensor) -> Experience:
    """``experience`` with other scores, of any number of objectives, and the token rewards that follow.

    Unlike ``token_rewards`` it does not check that the rewards are finite.
    """
    mask_BT = experience.response_mask_BT
    kl_BT = experience.kl_rewards_BT
    if kl_BT is None:
        first_BT = torch.where(_is_last(mask_BT), experience.scores_MB[0][:, None], 0.0)
        kl_BT = torch.where(mask_BT, experience.token_rewards_MBT[0] - first_BT, 0.0)
    rewards_MBT = kl_BT + torch.where(_is_last(mask_BT), scores_MB[:, :, None], 0.0)
    return replace(experience, scores_MB=scores_MB, token_rewards_MBT=rewards_MBT)


def score_returns(experience: Experience) -> Tensor:
    """What the scores add to the return of each sequence: float64 [M, B], 0 without a response token."""
    return torch.where(experience.response_mask_BT.any(dim=1), experience.scores_MB.double(), 0.0)


def kl_returns(experience: Experience) -> Tensor:
    """What all else adds to the return of each sequence, the KL reward: float64 [M, B].

    Without ``kl_rewards_BT`` it is what the token rewards have beyond the scores.
    """
    return kl_tokens(experience).sum(dim=2)


def kl_tokens(experience: Experience) -> Tensor:
    """The KL reward of every token: float64 [M, B, T], as ``kl_returns`` adds it up."""
    mask_BT = experience.response_mask_BT
    if experience.kl_rewards_BT is not None:
        kl_BT = torch.where(mask_BT, experience.kl_rewards_BT.double(), 0.0)
        return kl_BT.expand(len(experience.scores_MB), -1, -1)
    scores_MBT = torch.where(_is_last(mask_BT), experience.scores_MB.double()[:, :, None], 0.0)
    return torch.where(mask_BT, experience.token_rewards_MBT.double() - scores_MBT, 0.0)


def _is_last(mask_BT: Tensor) -> Tensor:
    """True on the last response token of each row that has one."""
    position_T = torch.arange(mask_BT.shape[1], device=mask_BT.device)
    last_B = torch.where(mask_BT, position_T, -1).amax(dim=1)
    return position_T == last_B[:, None]


def whiten(advantages_MBT: Tensor, mask_BT: Tensor, sum_over_data: Callable[[Tensor], Tensor]) -> Tensor:
    """Advantages with mean 0 and variance 1 per objective over the response tokens of *all* ranks.

    ``sum_over_data`` sums a tensor over the data-parallel ranks. Off the response the result is 0;
    an objective whose advantages are all equal becomes 0. The variance gets 1e-8 added, so that advantages
    far below 1e-4, such as the KL reward's where all scores are equal, stay small. Whitening rescales
    ``||g_i||``, which GAPO reads: leave it out unless you want that.
    """
    x_MBT = torch.where(mask_BT, advantages_MBT, 0.0).double()
    tokens = sum_over_data(mask_BT.sum().double()).clamp(min=1)
    mean_M = sum_over_data(x_MBT.sum(dim=(1, 2))) / tokens
    centred_MBT = torch.where(mask_BT, x_MBT - mean_M[:, None, None], 0.0)
    # Two passes: E[x^2] - E[x]^2 loses its digits where the mean is large.
    variance_M = sum_over_data(centred_MBT.square().sum(dim=(1, 2))) / tokens
    constant_M = variance_M <= _CONSTANT**2 * (mean_M.square() + variance_M)
    factor_M = torch.where(constant_M, 0.0, (variance_M + _VARIANCE_FLOOR).rsqrt())
    return (centred_MBT * factor_M[:, None, None]).to(advantages_MBT.dtype)
