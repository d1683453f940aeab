"""The min-norm combination of gradients that are rescaled first, without overflow."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.aggregation.base import cosine_matrix
from gapo_mega.ops import min_norm_

# Rescaled gradients longer than this, relative to the shortest one, are treated as this long.
_LONGEST = 1e20


@dataclass(frozen=True)
class Rescaled:
    """``a = argmin over the simplex of ||sum_i a_i g^N_i||^2``; ``||g^N_i||`` is proportional to lengths."""

    simplex: Tensor  # [M] a
    lengths: Tensor  # [M] relative to the shortest; what is too long is cut
    log_cut: Tensor  # [M] logarithm of what cutting multiplied the lengths by, 0 for most
    log_shortest: Tensor  # []
    status: Tensor  # [1] int32


def rescaled_min_norm(gram: Tensor, active: Tensor, log_lengths: Tensor) -> Rescaled:
    """On the device of ``gram`` [M, M], without waiting; ``log_lengths`` [M] count where ``active`` [M]."""
    shortest = torch.where(active, log_lengths, math.inf).min()
    # Where lengths differ by more than 1e20 the long ones add less than 1e-20 to the constraint
    # sum(a) = 1, so their exact length changes no digit of the direction.
    relative = log_lengths - shortest
    cut = relative.clamp(max=math.log(_LONGEST))
    lengths = cut.exp()
    simplex = torch.empty_like(lengths)
    status = torch.empty(1, dtype=torch.int32, device=gram.device)
    matrix = cosine_matrix(gram) * lengths[:, None] * lengths[None, :]
    min_norm_(simplex, status, matrix.contiguous(), exclude_zero=True)
    return Rescaled(simplex, lengths, torch.where(active, cut - relative, 0.0), shortest, status)
