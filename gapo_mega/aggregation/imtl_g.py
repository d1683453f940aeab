"""IMTL-G: the direction whose projections onto all gradients are equal."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.canonical import CanonicalMethod, Problem
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.option_checks import require_bool

# Of the sum of the sizes: a sum of either sign below this is rounding.
_ROUNDING = 1e-12


@dataclass(kw_only=True)
class ImtlG(CanonicalMethod):
    """``w = v / sum_i v_i`` with ``v = G^+ sqrt(diag G)``: ``<d, g_i> / ||g_i||`` is the same for every i,
    where the gradients are independent. Weights may be negative.

    ``ascend``: the published form divides by a sum that can be negative, and then every objective *falls*
    (published; the default, false). True divides by the absolute sum. Where the sum is 0 all weights are 0.

    Source: Liu et al., ICLR 2021; with dependent gradients as in arXiv 2406.16232 (TorchJD's ``IMTLG``).
    """

    name: ClassVar[str] = "imtl_g"

    ascend: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool("ascend", self.ascend)

    def combine(self, problem: Problem) -> Solution:
        solution = equal_projections(problem)
        total = solution.sum()
        if float(total.abs()) <= _ROUNDING * float(solution.abs().sum()):
            return Solution(torch.zeros_like(solution))
        return Solution(solution / (total.abs() if self.ascend else total))


def equal_projections(problem: Problem) -> Tensor:
    """``G^+ sqrt(diag G)`` [K]."""
    eps = torch.finfo(torch.float64).eps
    eigenvalues, vectors = torch.linalg.eigh(problem.cosines)
    if float(eigenvalues.min()) > eps * len(eigenvalues) * float(eigenvalues.max()):
        # Independent gradients: their cosines are better conditioned than G where lengths differ.
        solution: Tensor = vectors @ (vectors.sum(dim=0) / eigenvalues) / problem.norms
        return solution
    solution = torch.linalg.pinv(problem.gram, hermitian=True) @ problem.norms
    return solution
