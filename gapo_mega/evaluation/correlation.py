"""How far the rewards of a batch agree with one another."""

from __future__ import annotations

import torch
from torch import Tensor


def reward_correlation(scores_MB: Tensor, group_B: Tensor) -> Tensor:
    """Pearson correlation of the objectives *within* groups (samples of one prompt), float64 ``[M, M]``.

    Scores are centred on their group's mean and pooled, so that prompts that are easy on every objective do
    not hide a conflict between responses. NaN where an objective never varies within a group.
    """
    scores = scores_MB.double()
    _, index_B = torch.unique(group_B, return_inverse=True)
    counts = torch.bincount(index_B).double()
    sums = scores.new_zeros(scores.shape[0], len(counts)).index_add_(1, index_B, scores)
    centred = scores - (sums / counts)[:, index_B]
    covariance = centred @ centred.T
    # Rounding leaves a constant objective with a tiny variance, which would pass for a real one.
    scale = 1e-12 * scores.square().sum(dim=1).sqrt()
    deviation = covariance.diagonal().sqrt()
    deviation = torch.where(deviation > scale, deviation, torch.full_like(deviation, torch.nan))
    return (covariance / deviation[:, None] / deviation[None, :]).clamp(-1, 1)
