"""UPGrad: every gradient projected onto the dual cone of all, then summed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.preference import PreferredMethod
from gapo_mega.aggregation.quadratic import increments


@dataclass(kw_only=True)
class Upgrad(PreferredMethod):
    """``w = sum_i v_i`` with ``v_i = argmin v' G v subject to v >= u_i e_i``: the preferred combination of
    the gradients' projections onto the dual cone. No objective is hurt, and the direction is linear under
    scaling: a gradient twice as long adds twice as much.

    Source: Quinton and Rey, arXiv 2406.16232. TorchJD's ``UPGrad`` divides G by its trace and adds 1e-4 I;
    here nothing is added.
    """

    name: ClassVar[str] = "upgrad"

    def combine(self, problem: Problem) -> Solution:
        unit = torch.eye(len(problem.norms), dtype=torch.float64)
        projected = torch.stack([row + increments(problem.cosines, row) for row in unit])
        lengths = problem.numbers * problem.norms
        return Solution((lengths[:, None] * projected).sum(dim=0) / problem.norms)
