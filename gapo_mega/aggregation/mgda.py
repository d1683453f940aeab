"""MGDA: the shortest vector of the convex hull of the gradients (paper, eq. 5)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.ops import min_norm_


@dataclass(kw_only=True)
class Mgda(DeviceMethod):
    """``w = argmin over the simplex of ||sum_i w_i g_i||^2``.

    While every ``w_i`` is positive all objectives improve by the same amount (Theorem 3.1), so the
    one with the smallest gradient dictates the step.
    """

    name: ClassVar[str] = "mgda"

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        weights = gram.new_empty(gram.shape[0])
        status = torch.empty(1, dtype=torch.int32, device=gram.device)
        min_norm_(weights, status, gram.contiguous(), exclude_zero=True)
        return TensorSolution(weights, gram.new_zeros(()), status)
