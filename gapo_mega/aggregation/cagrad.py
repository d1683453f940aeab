"""CAGrad: the step near the preferred one that is best for the objective that gains least."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.preference import PreferredMethod
from gapo_mega.aggregation.safe import nearest
from gapo_mega.ops import min_norm_
from gapo_mega.option_checks import is_number

# Of the size of its summands: a combination shorter than this is rounding. The Gram matrix has the squares.
_ROUNDING = 2.0**-25


@dataclass(kw_only=True)
class Cagrad(PreferredMethod):
    """``w = u + c ||g_0|| p / ||g_p||`` with ``g_0 = sum_i u_i g_i``, ``g_p = sum_i p_i g_i`` and ``p`` the
    point of the simplex that minimises ``<g_p, g_0> + c ||g_0|| ||g_p||``: of all directions within
    ``c ||g_0||`` of ``g_0`` the one whose worst objective gains most.

    ``c``: >= 0 and < 1, the radius; 0 is the weighted sum. The paper's experiments use 0.2 to 0.5.

    Where ``g_p`` is 0 no direction within the radius raises every objective, and the formula is 0 / 0. Every
    direction there that hurts none is a solution; the nearest to ``g_0`` is taken.

    Source: Liu et al., arXiv 2110.14048. The objective's weights are uniform there. TorchJD gives zero
    weights where ``||g_p||`` is below 1e-4; the published code can also divide by ``1 + c^2``, for which
    there is ``scale``.
    """

    name: ClassVar[str] = "cagrad"

    c: float = 0.5

    def __post_init__(self) -> None:
        super().__post_init__()
        if not is_number(self.c) or not 0 <= self.c < 1:
            raise ValueError(f"c: found {self.c!r}, accepted: a number >= 0 and < 1")

    def combine(self, problem: Problem) -> Solution:
        preferred = problem.numbers
        radius = self.c * length(problem, preferred)
        if radius == 0.0:
            return Solution(preferred)
        added = self.added(worst_mixture(problem, self.c), preferred)
        reached = length(problem, added)
        if reached <= _ROUNDING * float(added @ problem.norms):
            return self.stationary(problem)
        return Solution(preferred + radius / reached * added)

    def added(self, mixture: Tensor, preferred: Tensor) -> Tensor:
        """The combination [K], of any length, that is added to the preferred one."""
        return mixture

    def stationary(self, problem: Problem) -> Solution:
        """What to take where that combination is 0."""
        return nearest(problem)


def length(problem: Problem, weights: Tensor) -> float:
    """``||sum_i weights_i g_i||`` in the units of the problem."""
    summands = weights * problem.norms
    return math.sqrt(max(float(summands @ problem.cosines @ summands), 0.0))


def worst_mixture(problem: Problem, c: float) -> Tensor:
    """``p`` [K] on the simplex that minimises ``<g_p, g_0> + c ||g_0|| ||g_p||``, for c > 0 and g_0 not 0.

    With the length of ``g_p`` given as ``c s``, ``p`` is the min-norm point of the gradients moved by ``s g_0
    / ||g_0||``, since ``min ||g_p||^2 / (2 c s) + c s / 2 = ||g_p||``. The ratio ``||g_p|| / s`` falls with
    s, so that the s at which it is c is the root of a monotone function of one number.
    """
    from scipy.optimize import brentq  # a third of a second, of which other methods need none

    gram = problem.gram
    unit = problem.numbers / length(problem, problem.numbers)
    along = gram @ unit

    def mixture(log_s: float) -> Tensor:
        s = math.exp(log_s)
        return min_norm(gram + s * (along[:, None] + along[None, :]) + s * s)

    def excess(log_s: float) -> float:
        found = mixture(log_s)
        size = max(length(problem, found), _ROUNDING * float(found @ problem.norms))
        return math.log(size) - math.log(c) - log_s

    # ||g_p|| is below 1 and above the rounding of the shortest gradient: between these ends lies the root.
    highest = -math.log(c) + 1.0
    lowest = math.log(float(problem.norms.min())) + math.log(_ROUNDING) - 1.0
    root = brentq(excess, lowest, highest, xtol=1e-14, rtol=8.9e-16)
    return mixture(float(root))


def min_norm(gram: Tensor) -> Tensor:
    """``argmin over the simplex of a' gram a``, float64 [K]."""
    weights = torch.empty(len(gram), dtype=torch.float64)
    status = torch.empty(1, dtype=torch.int32)
    min_norm_(weights, status, gram.contiguous(), exclude_zero=False)
    return weights
