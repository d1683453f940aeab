"""MGDA-Decoupled: min-norm coefficients of loss-normalised gradients, applied to the gradients."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.aggregation.rescaled import rescaled_min_norm
from gapo_mega.option_checks import numbers_in


@dataclass(kw_only=True)
class MgdaDecoupled(DeviceMethod):
    """``w = argmin over the simplex of ||sum_i w_i g_i / L_i||^2``; the direction is ``sum_i w_i g_i``.

    ``losses``: L, one number > 0 per objective. The paper takes the current losses of DPO, which are
    positive. A policy's loss changes sign, so here the sizes have to be declared. If left out all are alike,
    which is ``mgda``.

    Not a common ascent direction in general. Source: arXiv 2604.20685.
    """

    name: ClassVar[str] = "mgda_decoupled"
    in_every_audit: ClassVar[bool] = False
    equal_when_left_out: ClassVar[str | None] = "losses"

    losses: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.losses is not None and not numbers_in(self.losses, zeros=False):
            raise ValueError(f"losses: found {self.losses!r}, accepted: a list of finite numbers > 0")

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.losses is None else {"losses": self.losses}

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        log_lengths = torch.where(active, gram.diagonal(), 1.0).sqrt().log()
        if numbers is not None:
            log_lengths = log_lengths - numbers.log()
        found = rescaled_min_norm(gram, active, log_lengths)
        return TensorSolution(found.simplex * found.log_cut.exp(), gram.new_zeros(()), found.status)
