"""Fixed weights: the gradient of one weighted sum of the objectives (MORLHF in the paper)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.safe import SafeMethod
from gapo_mega.option_checks import require_weights


@dataclass(kw_only=True)
class WeightedSum(SafeMethod):
    """``w = weights``, whatever the gradients are.

    ``weights``: one number >= 0 per objective, not all 0; ``[1, 0]`` trains the first one only. If left out,
    every objective has weight 1/M. The weights of excluded objectives are dropped; the others stay as they
    are (``scale: sum_to_one`` renormalises them). ``safe: true`` raises the weights of those that the sum
    would hurt.
    """

    name: ClassVar[str] = "weighted_sum"
    equal_when_left_out: ClassVar[str | None] = "weights"

    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        require_weights("weights", self.weights)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.weights is None else {"weights": self.weights}

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        given = 1.0 / active.sum().to(torch.float64) if numbers is None else numbers
        weights = torch.where(active, given, 0.0).to(torch.float64)
        status = torch.zeros(1, dtype=torch.int32, device=gram.device)
        return TensorSolution(weights, gram.new_zeros(()), status)
