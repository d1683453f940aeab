"""CAGrad-Clip: CAGrad in which no objective is corrected by more than its preference."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.cagrad import Cagrad
from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.on_host import Solution


@dataclass(kw_only=True)
class CagradClip(Cagrad):
    """``w = u + c ||g_0|| q / ||g_q||`` with ``q_i = min(p_i, u_i)`` and ``p`` that of ``cagrad``.

    Where ``g_q`` is 0 nothing is added, and ``w = u``.

    Source: RACO, arXiv 2602.02495.
    """

    name: ClassVar[str] = "cagrad_clip"

    def added(self, mixture: Tensor, preferred: Tensor) -> Tensor:
        return torch.minimum(mixture, preferred)

    def stationary(self, problem: Problem) -> Solution:
        return Solution(problem.numbers)
