"""GAPO: the min-norm combination of rescaled gradients (paper, eqs. 6 and 7)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.follows_progress import FollowsProgress
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.aggregation.rates import adaptive_rates
from gapo_mega.aggregation.rescaled import rescaled_min_norm
from gapo_mega.option_checks import numbers_in, require_bool, require_number, require_preference


@dataclass(kw_only=True)
class Gapo(FollowsProgress, DeviceMethod):
    """``g^N_i = g_i / ||g_i||^p``, ``a = argmin over the simplex of ||sum_i a_i g^N_i||^2``, and
    ``w_i = a_i / ||g_i||^p``, so that the direction is ``sum_i a_i g^N_i``.

    ``p``: any number >= 0; the paper uses 1 and 2, 0 is MGDA. Objectives improve in the ratio
    ``||g_i||^p / ||g_j||^p`` (Theorem 3.3).

    ``eq17_literal``: ``w_i = a_i``, the printed eq. 17, which weights the raw losses by ``a`` and leaves
    the factor ``1 / ||g_i||^p`` out. Theorem 3.2 does not hold for it.

    ``rates``: s, with which ``g^N_i = g_i / (s_i ||g_i||^p)`` (s relative to its mean): objectives improve in
    the ratio ``s_i ||g_i||^p``, and still none is hurt. A list of numbers > 0, one per objective;
    ``preference``, which takes them from the option of that name; or ``adaptive``: ``s_i = u_i exp(-eta
    (progress_i / (M u_i) - mean))``, cut to [0.02, 50] times the mean, with ``u`` from ``preference`` (equal
    if left out) and progress the running mean of rewards in units of their spread at the start. If left out,
    all rates are alike, as in the paper.

    ``eta``: > 0, for ``adaptive``: how strongly who is behind is favoured. ``preference``: as in ``p_gapo``.
    """

    name: ClassVar[str] = "gapo"
    variants: ClassVar[tuple[Mapping[str, Any], ...]] = ({"p": 1.0}, {"p": 2.0})  # the paper's
    always_shown: ClassVar[tuple[str, ...]] = ("p",)  # what it does hinges on it

    p: float = 1.0
    eq17_literal: bool = False
    rates: Sequence[float] | str | None = None
    preference: Sequence[float] | None = None
    eta: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool("eq17_literal", self.eq17_literal)
        require_number("p", self.p, 0)
        require_number("eta", self.eta, 0, above=True)
        self._check_rates()

    def _check_rates(self) -> None:
        rates, named = self.rates, self.rates in ("preference", "adaptive")
        if rates is not None and self.eq17_literal:
            raise ValueError(f"rates: found {rates!r} with eq17_literal, accepted: one of the two")
        if rates is not None and not named and not numbers_in(rates, zeros=False):
            raise ValueError(
                f"rates: found {rates!r}, accepted: preference, adaptive, or a list of finite numbers > 0"
            )
        require_preference("preference", self.preference, zeros=False)
        if (self.preference is None and rates == "preference") or (self.preference is not None and not named):
            raise ValueError(
                f"preference: found {self.preference!r} with rates {rates!r}, accepted: one number per "
                "objective with rates: preference or adaptive"
            )

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        if self.preference is not None:
            return {"preference": self.preference}
        return {"rates": self.rates} if self.rates and not isinstance(self.rates, str) else {}

    def solution(self, gram: Tensor, active: Tensor) -> TensorSolution:
        progress = self._progress.value
        if self.rates != "adaptive" or progress is None:
            return super().solution(gram, active)
        if len(progress) != len(gram):
            raise ValueError(
                f"rates: found the progress of {len(progress)} objectives, accepted: of the {len(gram)} "
                "whose gradients are combined"
            )
        rates = adaptive_rates(self.preference, progress, float(self.eta))
        return self.formula(gram, active, rates.to(gram.device))

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        norms = torch.where(active, gram.diagonal(), 1.0).sqrt()
        # ||g^N_i|| = ||g_i||^(1-p) / s_i, as logarithms: nothing overflows.
        log_lengths = (1.0 - self.p) * norms.log()
        if numbers is not None:
            mean = torch.where(active, numbers, 0.0).sum() / active.sum()
            log_lengths = log_lengths - torch.where(active, (numbers / mean).log(), 0.0)
        found = rescaled_min_norm(gram, active, log_lengths)
        if self.eq17_literal:
            return TensorSolution(found.simplex, torch.zeros_like(found.log_shortest), found.status)
        # a_i / (s_i ||g_i||^p) = (a_i ||g^N_i||) / ||g_i||
        return TensorSolution(found.simplex * found.lengths / norms, found.log_shortest, found.status)

    @property
    def looks_at_scores(self) -> bool:
        return self.rates == "adaptive"
