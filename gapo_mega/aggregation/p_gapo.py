"""P-GAPO: a user's preference over unit gradients (paper, eq. 8)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.safe import SafeMethod
from gapo_mega.option_checks import require_preference


@dataclass(kw_only=True)
class PGapo(SafeMethod):
    """``w_i = lambda_i / ||g_i||``; there is no minimisation.

    ``preference``: lambda, one number > 0 per objective with sum 1 (within 0.001, then normalised).
    If left out, every objective has 1/M. When objectives are excluded, lambda is renormalised over the
    others.

    Not a common ascent direction in general: of two objectives, i loses to first order exactly when
    ``cos(g_1, g_2) < -lambda_i / lambda_j``. With ``safe: true`` it is one: the nearest direction that hurts
    none.
    """

    name: ClassVar[str] = "p_gapo"
    equal_when_left_out: ClassVar[str | None] = "preference"

    preference: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preference("preference", self.preference, zeros=False)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.preference is None else {"preference": self.preference}

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        norms = torch.where(active, gram.diagonal(), 1.0).sqrt()
        preference = torch.where(active, 1.0 if numbers is None else numbers, 0.0).to(torch.float64)
        weights = torch.where(active, preference / preference.sum() / norms, 0.0)
        status = torch.zeros(1, dtype=torch.int32, device=gram.device)
        return TensorSolution(weights, gram.new_zeros(()), status)
