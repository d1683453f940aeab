"""Normalising scores within prompts and advantages over a batch, as public trainers do it."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega.advantages.group import group_deviations, group_spreads

# What is left of a sum of squares by rounding: below this share of it, nothing.
_ROUNDING = 1e-12
_WHITENING_FLOOR = 1e-8  # verl's, on the variance


def group_normalized(x_MB: Tensor, group_B: Tensor, epsilon: float) -> Tensor:
    """``(x - mean) / (std + epsilon)`` [M, B] float64 of each prompt, n - 1 in the variance.

    0 where a prompt's values are equal up to the rounding of float32, whatever ``epsilon`` is.
    """
    deviation_MB = group_deviations(x_MB, group_B, "mean")
    spread_MB = group_spreads(x_MB, group_B)
    return torch.where(spread_MB == 0, 0.0, deviation_MB / (spread_MB + epsilon))


def others_normalized(x_MB: Tensor, group_B: Tensor, epsilon: float) -> Tensor:
    """``(x - mean of the others) / (std of the others + epsilon)`` [M, B] float64 of each prompt.

    The others are the prompt's samples but this one, with n - 2 in the variance. Where they do not spread,
    the deviation is not divided, as in NeMo-RL.
    """
    from_all_MB = group_deviations(x_MB, group_B, "mean")
    _, member_B, counts_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    count_B = counts_G[member_B].double()
    squares_MG = from_all_MB.new_zeros(len(x_MB), len(counts_G))
    squares_MB = squares_MG.index_add(1, member_B, from_all_MB.square())[:, member_B]
    # Without sample i, the sum of squares about the new mean falls by d_i^2 n / (n - 1).
    left_MB = squares_MB - from_all_MB.square() * count_B / (count_B - 1)
    left_MB = torch.where(left_MB > _ROUNDING * squares_MB, left_MB, 0.0)
    spread_MB = (left_MB / (count_B - 2).clamp(min=1)).sqrt()
    deviation_MB = from_all_MB * count_B / (count_B - 1)
    deviation_MB = torch.where(group_spreads(x_MB, group_B) == 0, 0.0, deviation_MB)
    return torch.where(spread_MB == 0, deviation_MB, deviation_MB / (spread_MB + epsilon))


def batch_normalized(x_B: Tensor, epsilon: float) -> Tensor:
    """``(x - mean) / (std + epsilon)`` [B] of the samples, n - 1 in the variance; 0 where nothing spreads."""
    if len(x_B) < 2:
        return torch.zeros_like(x_B)
    centred_B, spread = x_B - x_B.mean(), x_B.std()
    if float(spread) <= _ROUNDING * float(x_B.abs().max()):
        return torch.zeros_like(x_B)
    return centred_B / (spread + epsilon)


def token_whitened(x_B: Tensor, lengths_B: Tensor) -> Tensor:
    """``(x - mean) / sqrt(var + 1e-8)`` [B] of the *tokens*, so that long responses weigh more; as in verl.

    Responses of length 0 do not count. 0 where nothing counts or nothing spreads.
    """
    lengths_B = lengths_B.double()
    tokens = float(lengths_B.sum())
    if tokens < 2:
        return torch.zeros_like(x_B)
    centred_B = x_B - (lengths_B @ x_B) / tokens
    variance = lengths_B @ centred_B.square() / (tokens - 1)
    if float(variance.sqrt()) <= _ROUNDING * float(x_B.abs().max()):
        return torch.zeros_like(x_B)
    return centred_B * (variance + _WHITENING_FLOOR).rsqrt()
