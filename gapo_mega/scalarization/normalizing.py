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
    found_MB = torch.zeros(x_MB.shape, dtype=torch.float64)
    alike_MB = group_spreads(x_MB, group_B) == 0
    for number in torch.unique(group_B):
        rows_N = (group_B == number).nonzero().flatten()
        count = len(rows_N)
        own_MN = x_MB[:, rows_N].double()
        # Not from sums over all samples: where the others are close together, their spread would cancel.
        others_MNK = own_MN[:, None, :].expand(-1, count, -1)[:, ~torch.eye(count, dtype=torch.bool)]
        others_MNK = others_MNK.view(len(x_MB), count, count - 1)
        spread_MN = others_MNK.std(dim=2) if count > 2 else torch.zeros_like(own_MN)
        deviation_MN = own_MN - others_MNK.mean(dim=2)
        divided_MN = deviation_MN / (spread_MN + epsilon)
        found_MB[:, rows_N] = torch.where(spread_MN == 0, deviation_MN, divided_MN)
    return torch.where(alike_MB, 0.0, found_MB)


def batch_normalized(x_B: Tensor, lengths_B: Tensor, epsilon: float) -> Tensor:
    """``(x - mean) / (std + epsilon)`` [B] of the samples, n - 1 in the variance; 0 where nothing spreads.

    Responses of length 0, such as those of prompts that were left out, do not count and get 0.
    """
    counted_B = lengths_B > 0
    found_B, counted = torch.zeros_like(x_B), x_B[counted_B]
    if len(counted) < 2:
        return found_B
    spread = counted.std()
    if float(spread) > _ROUNDING * float(counted.abs().max()):
        found_B[counted_B] = (counted - counted.mean()) / (spread + epsilon)
    return found_B


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
