"""GAPO: the min-norm combination of rescaled gradients (paper, eqs. 6 and 7)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution, cosine_matrix, is_number, require_bool
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.ops import min_norm_

# Rescaled gradients longer than this, relative to the shortest one, are treated as this long.
_LONGEST = 1e20


@dataclass(kw_only=True)
class Gapo(DeviceMethod):
    """``g^N_i = g_i / ||g_i||^p``, ``a = argmin over the simplex of ||sum_i a_i g^N_i||^2``, and
    ``w_i = a_i / ||g_i||^p``, so that the direction is ``sum_i a_i g^N_i``.

    ``p``: any number >= 0; the paper uses 1 and 2, 0 is MGDA. Objectives improve in the ratio
    ``||g_i||^p / ||g_j||^p`` (Theorem 3.3).

    ``eq17_literal``: ``w_i = a_i``, the printed eq. 17, which weights the raw losses by ``a`` and leaves
    the factor ``1 / ||g_i||^p`` out. Theorem 3.2 does not hold for it.
    """

    name: ClassVar[str] = "gapo"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"p": 1.0}, {"p": 2.0})  # the paper's
    always_shown: ClassVar[tuple[str, ...]] = ("p",)  # what it does hinges on it

    p: float = 1.0
    eq17_literal: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool("eq17_literal", self.eq17_literal)
        if not is_number(self.p) or self.p < 0:
            raise ValueError(f"p: found {self.p!r}, accepted: a finite number >= 0")

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        norms = torch.where(active, gram.diagonal(), 1.0).sqrt()
        # ||g^N_i|| = ||g_i||^(1-p), as logarithms relative to the shortest: nothing overflows.
        log_lengths = (1.0 - self.p) * norms.log()
        shortest = torch.where(active, log_lengths, math.inf).min()
        # Where lengths differ by more than 1e20 the long ones add less than 1e-20 to the constraint
        # sum(a) = 1, so their exact length changes no digit of the direction.
        lengths = (log_lengths - shortest).clamp(max=math.log(_LONGEST)).exp()
        simplex = torch.empty_like(norms)
        status = torch.empty(1, dtype=torch.int32, device=gram.device)
        rescaled = cosine_matrix(gram) * lengths[:, None] * lengths[None, :]
        min_norm_(simplex, status, rescaled.contiguous(), exclude_zero=True)
        if self.eq17_literal:
            return TensorSolution(simplex, torch.zeros_like(shortest), status)
        # a_i / ||g_i||^p = (a_i ||g^N_i||) / ||g_i||
        return TensorSolution(simplex * lengths / norms, shortest, status)
