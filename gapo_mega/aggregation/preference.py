"""The option ``preference``: what a user asks for, one number per objective."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.canonical import CanonicalMethod
from gapo_mega.option_checks import require_preference


@dataclass(kw_only=True)
class PreferredMethod(CanonicalMethod):
    """A method of the host with a preference ``u``, which its formula finds in ``Problem.numbers``.

    ``preference``: u, one number per objective with sum 1 (within 0.001, then normalised), all >= 0;
    ``fairgrad`` and ``nash_mtl`` need > 0. If left out, every objective has 1/M. When objectives are
    excluded, u is renormalised over the others; where all of those have 0, all of them have the same.
    """

    allows_zero: ClassVar[bool] = True
    equal_when_left_out: ClassVar[str | None] = "preference"

    preference: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preference("preference", self.preference, zeros=self.allows_zero)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.preference is None else {"preference": self.preference}

    def numbers(self, active: Sequence[int]) -> Tensor:
        if self.preference is None or not any(self.preference[i] for i in active):
            return super().numbers(active)
        shares = torch.tensor([self.preference[i] for i in active], dtype=torch.float64)
        return shares / shares.sum()
