"""FairGrad: the direction whose gains are alpha-fair."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.fairness import alpha_fair
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.preference import PreferredMethod
from gapo_mega.option_checks import require_number


@dataclass(kw_only=True)
class Fairgrad(PreferredMethod):
    """``w > 0`` with ``(G w)_i = (w_i / (M u_i))^(-1 / alpha)``; with equal preference ``G w = w^(-1 /
    alpha)``.

    ``alpha``: > 0. 1 is ``nash_mtl`` (proportional fairness); small values come near to the plain sum of the
    gradients, large ones raise the objective that gains least. The paper's experiments use 1 and 2.

    Where no direction raises every objective the equation has no solution; the direction then goes to 0.

    Source: Ban and Ji, arXiv 2402.15638, which has no preference: here it weighs the utilities.
    """

    name: ClassVar[str] = "fairgrad"
    allows_zero: ClassVar[bool] = False

    alpha: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("alpha", self.alpha, 0, above=True)

    def combine(self, problem: Problem) -> Solution:
        return alpha_fair(problem, float(self.alpha))
