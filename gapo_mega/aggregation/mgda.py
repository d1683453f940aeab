"""MGDA: the shortest vector of the convex hull of the gradients (paper, eq. 5)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gapo_mega.aggregation.base import Aggregator, Solution
from gapo_mega.ops import min_norm


@dataclass(kw_only=True)
class Mgda(Aggregator):
    """``w = argmin over the simplex of ||sum_i w_i g_i||^2``.

    While every ``w_i`` is positive all objectives improve by the same amount (Theorem 3.1), so the
    one with the smallest gradient dictates the step.
    """

    name: ClassVar[str] = "mgda"

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        return Solution(min_norm(gram))
