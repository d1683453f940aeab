"""DualProj: the preferred combination, projected onto the dual cone of the gradients."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.preference import PreferredMethod
from gapo_mega.aggregation.safe import nearest


@dataclass(kw_only=True)
class DualProj(PreferredMethod):
    """``w = argmin v' G v subject to v >= u``: of all directions that hurt no objective the one nearest to
    ``sum_i u_i g_i``.

    Source: gradient episodic memory (Lopez-Paz and Ranzato 2017); ``DualProj`` of TorchJD, which divides G
    by its trace and adds 1e-4 I; here nothing is added.
    """

    name: ClassVar[str] = "dual_proj"

    def combine(self, problem: Problem) -> Solution:
        return nearest(problem)
