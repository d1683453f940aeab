"""Nash-MTL: the bargaining solution, in which relative gains are balanced."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.canonical import Problem, in_canonical_order
from gapo_mega.aggregation.fairness import alpha_fair
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.preference import PreferredMethod
from gapo_mega.ops import Aggregated
from gapo_mega.option_checks import is_number


@dataclass(kw_only=True)
class NashMtl(PreferredMethod):
    """``w > 0`` with ``(G w)_i = M u_i / w_i``; with equal preference ``G w = 1 / w``, ``fairgrad`` with
    alpha 1.

    ``every``: weights are found at every that many steps of the optimizer and kept in between. An objective
    that has a gradient and no kept weight makes them be found anew.

    ``max_norm``: a longer direction is shortened to this length; null for none. The solution's own length is
    ``sqrt(M)`` at the step at which it is found, whatever the gradients. ``scale`` comes afterwards.

    Where no direction raises every objective the equation has no solution; the direction then goes to 0.

    Source: Navon et al., arXiv 2202.01017, without a preference (here it is that of an asymmetric bargain).
    The published code finds the weights of G divided by its Frobenius norm, so that its directions are
    ``||G||_F^(1/2)`` times as long before they are shortened; and approximately, by 20 convex programs.
    """

    name: ClassVar[str] = "nash_mtl"
    allows_zero: ClassVar[bool] = False

    every: int = 1
    max_norm: float | None = 1.0
    _weights: list[float] = field(default_factory=list, init=False, repr=False, compare=False)  # [M], kept
    _age: int = field(default=0, init=False, repr=False, compare=False)  # steps taken with them

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.every, bool) or not isinstance(self.every, int) or self.every < 1:
            raise ValueError(f"every: found {self.every!r}, accepted: an integer >= 1")
        if self.max_norm is not None and not (is_number(self.max_norm) and self.max_norm > 0):
            raise ValueError(f"max_norm: found {self.max_norm!r}, accepted: a finite number > 0, or null")

    def combine(self, problem: Problem) -> Solution:
        return alpha_fair(problem, 1.0)

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        found = self._kept(active) or super().solve(gram, active)
        return found if self.max_norm is None else _shortened(found, gram, self.max_norm)

    def commit(self, found: Aggregated) -> None:
        gram = found.gram.cpu()
        taking_part = (gram.diagonal() > 0).nonzero().flatten()
        active = taking_part.tolist()
        if not active or self._kept(active) is not None:
            self._age += 1
            return
        solved = super().solve(gram[taking_part][:, taking_part], active)
        weights = torch.zeros(len(gram), dtype=torch.float64)
        weights[taking_part] = solved.weights * math.exp(solved.log_factor)
        self._weights, self._age = weights.tolist(), 1

    def state_dict(self) -> dict[str, Any]:
        return {"weights": list(self._weights), "age": self._age}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if set(state) != {"weights", "age"}:
            raise ValueError(f"aggregation {self.name}: found state {sorted(state)}, accepted: age, weights")
        self._weights, self._age = list(state["weights"]), int(state["age"])

    def _kept(self, active: Sequence[int]) -> Solution | None:
        """The kept weights of the objectives ``active``; None where new ones are due."""
        if not self._weights or self._age >= self.every:
            return None
        weights = torch.tensor([self._weights[i] for i in active], dtype=torch.float64)
        return Solution(weights) if bool((weights > 0).all()) else None


def _shortened(found: Solution, gram: Tensor, limit: float) -> Solution:
    """``found``, times a factor that makes its direction at most ``limit`` long."""

    def shorten(problem: Problem) -> Solution:
        summands = problem.numbers * problem.norms
        size = float(summands.abs().max())
        if not 0 < size < math.inf:
            return Solution(problem.numbers, found.log_factor)
        relative = summands / size
        square = float(relative @ problem.cosines @ relative)
        if square <= 0.0:
            return Solution(problem.numbers, found.log_factor)
        log_length = found.log_factor + math.log(size) + math.log(square) / 2
        log_length += problem.exponent * math.log(2)
        return Solution(problem.numbers, found.log_factor - max(log_length - math.log(limit), 0.0))

    return replace(in_canonical_order(gram, found.weights, shorten), status=found.status)
