"""Smooth Tchebycheff weights (after Lin et al., arXiv 2402.19078), steered by progress, that hurt nobody."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.follows_progress import FollowsProgress
from gapo_mega.aggregation.safe import SafeMethod
from gapo_mega.option_checks import require_number, require_preference


@dataclass(kw_only=True)
class TchebycheffSafe(FollowsProgress, SafeMethod):
    """Start from ``w0_i = v_i / unit_i``, ``v_i`` proportional to ``u_i exp(-progress_i / mu)`` with sum 1.

    ``progress_i`` is the running mean of how far the scores of objective i have come since the start, and
    ``unit_i`` their spread there, as for the scalarizer ``tchebycheff``: whoever lags gets the weight.
    Then, with ``safe`` (the default here), ``w = argmin v' G v subject to v >= w0``, so that no objective is
    hurt to first order. With ``safe: false`` the direction is the scalarizer's, from gradients.

    ``preference``: u, as in ``p_gapo``. ``mu``: > 0; small: the one that lags most alone, large: u.
    """

    name: ClassVar[str] = "tchebycheff_safe"
    equal_when_left_out: ClassVar[str | None] = "preference"
    in_every_audit: ClassVar[bool] = False

    safe: bool = True
    preference: Sequence[float] | None = None
    mu: float = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preference("preference", self.preference, zeros=False)
        require_number("mu", self.mu, 0, above=True)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.preference is None else {"preference": self.preference}

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        preference = torch.where(active, 1.0 if numbers is None else numbers, 0.0).to(torch.float64)
        weights = torch.where(active, self._progress.steered(preference, float(self.mu)), 0.0)
        status = torch.zeros(1, dtype=torch.int32, device=gram.device)
        return TensorSolution(weights, gram.new_zeros(()), status)

    @property
    def looks_at_scores(self) -> bool:
        return True
