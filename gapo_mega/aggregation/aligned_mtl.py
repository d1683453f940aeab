"""Aligned-MTL: the gradients turned into orthogonal ones of equal length, as near as possible."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch

from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.preference import PreferredMethod


@dataclass(kw_only=True)
class AlignedMtl(PreferredMethod):
    """``w = sqrt(l_min) V L^(-1/2) V' u`` with ``G = V L V'`` over the eigenvalues that are not 0, of which
    ``l_min`` is the smallest: the principal components of the gradients, all as short as the shortest.

    Eigenvalues up to K times the rounding of the largest count as 0. The direction jumps where one crosses
    that. Weights may be negative.

    Source: Senushkin et al., arXiv 2305.19000; TorchJD's ``AlignedMTL`` with ``scale_mode="min"``.
    """

    name: ClassVar[str] = "aligned_mtl"

    def combine(self, problem: Problem) -> Solution:
        eigenvalues, vectors = torch.linalg.eigh(problem.gram)
        eps = torch.finfo(torch.float64).eps
        kept = eigenvalues > eigenvalues.max() * len(eigenvalues) * eps
        eigenvalues, vectors = eigenvalues[kept], vectors[:, kept]
        balance = (eigenvalues.min() / eigenvalues).sqrt()
        return Solution(vectors @ (balance * (vectors.T @ problem.numbers)))
