"""What the Gram matrix and the weights say about a step, for logs and reports."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.aggregation.base import cosine_matrix, zero_objectives

# Inner products and (G w)_i are sums of terms of either sign: below this share of their size, rounding.
_ROUNDING = 1e-12


@dataclass(frozen=True)
class Diagnosis:
    """First-order facts of one step; all of them follow from ``G`` and ``w``.

    ``corner``: some objective with a gradient got weight 0. For MGDA and GAPO the minimiser then lies
    on the boundary of the simplex and Theorems 3.1 and 3.3 hold for the other objectives only.
    ``opposed``: some pair of gradients has a negative inner product. ``conflict``: the step hurts an
    objective.
    """

    norms: Tensor  # [M] ||g_i||
    cosines: Tensor  # [M, M]; 0 in the rows and columns of zero gradients
    predicted_change: Tensor  # [M] (G w)_i = <d, g_i>: change of objective i per unit step along d
    direction_norm: float  # ||d|| = sqrt(w' G w)
    corner: bool
    opposed: bool
    excluded: list[int]  # objectives with a zero gradient
    hurt: list[int]  # objectives with a negative predicted change

    @property
    def conflict(self) -> bool:
        """Some objective has a negative predicted change."""
        return bool(self.hurt)


def diagnose(gram: Tensor, weights: Tensor) -> Diagnosis:
    """The diagnosis of one step from ``gram`` [M, M] and ``weights`` [M].

    NaN and Inf in the Gram matrix pass through to the numbers, so that a skipped step can be logged.
    """
    gram = gram.detach().to("cpu", torch.float64)
    weights = weights.detach().to("cpu", torch.float64)
    norms = gram.diagonal().sqrt()
    excluded = zero_objectives(gram)
    active = norms > 0
    predicted_change = gram @ weights
    rounding = _ROUNDING * norms * (norms * weights.abs()).sum()
    return Diagnosis(
        norms=norms,
        cosines=cosine_matrix(gram),
        predicted_change=predicted_change,
        direction_norm=float((weights @ predicted_change).clamp(min=0).sqrt()),
        corner=bool((active & (weights == 0)).any()),
        opposed=bool((gram < -_ROUNDING * norms[:, None] * norms).any()),
        excluded=excluded,
        hurt=(predicted_change < -rounding).nonzero().flatten().tolist(),
    )
