"""MO-GRPO: a sum of scores, each divided by its spread (arXiv 2509.22047)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from torch import Tensor

from gapo_mega.option_checks import require_number, require_weights
from gapo_mega.scalarization.base import Scalarizer
from gapo_mega.scalarization.normalizing import group_normalized
from gapo_mega.scalarization.options import weights_of


@dataclass(kw_only=True)
class MoGrpo(Scalarizer):
    """``A = sum_k c_k (r_k - mean) / (std + epsilon)`` within each prompt, without a step over the batch.

    ``weights``: c, one number >= 0 per objective, not all 0; if left out 1 each, as in the paper.
    ``epsilon``: a number >= 0.
    """

    name: ClassVar[str] = "mo_grpo"
    gives: ClassVar[Literal["rewards", "advantages"]] = "advantages"
    least_samples: ClassVar[int] = 2

    weights: Sequence[float] | None = None
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        require_weights("weights", self.weights)
        require_number("epsilon", self.epsilon, 0)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.weights is None else {"weights": self.weights}

    def __call__(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        weights = weights_of(self.weights, len(scores_MB))
        return weights @ group_normalized(scores_MB, group_B, self.epsilon)
