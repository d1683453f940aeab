"""MORLHF: reinforcement learning on one weighted sum of the scores (baseline of many papers)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gapo_mega.option_checks import require_preference
from gapo_mega.scalarization.base import Weighted
from gapo_mega.scalarization.options import preference_of


@dataclass(kw_only=True)
class Morlhf(Weighted):
    """``r = sum_k u_k r_k``.

    ``preference``: u, one number >= 0 per objective with sum 1 (within 0.001, then normalised); if left out,
    every objective has 1/M. Scores of different scales are summed as they are: their scales weigh, too.
    ``aggregation.name: weighted_sum`` weighs gradients instead, which is the same for estimators that are
    linear in the scores, and not for those that normalise them.
    """

    name: ClassVar[str] = "morlhf"

    preference: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preference("preference", self.preference, zeros=True)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.preference is None else {"preference": self.preference}

    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        return preference_of(self.preference, len(scores_MB))
