"""Fast RL: weights that fall exponentially with an objective's reward (EMNLP 2024.565)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.option_checks import require_number
from gapo_mega.scalarization.base import Weighted


@dataclass(kw_only=True)
class FastRl(Weighted):
    """``r = sum_k w_k r_k``, ``w_k <- w_k exp(-rate mean r_k) / Z`` at every batch, from 1/M.

    The weights of a batch have seen its own scores. ``rate``: a number >= 0. Nothing pulls the weights back:
    objectives of unequal scores end at weights 0 and 1, the sooner the larger ``rate`` and the scores are.
    """

    name: ClassVar[str] = "fast_rl"

    rate: float = 0.1
    _log_weights: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("rate", self.rate, 0)

    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        return self._next(scores_MB).exp()

    def commit(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> None:
        self._log_weights = self._next(scores_MB).tolist()

    def state_dict(self) -> dict[str, Any]:
        return {"log_weights": self._log_weights}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._log_weights = [float(x) for x in state["log_weights"]]

    def _next(self, scores_MB: Tensor) -> Tensor:
        """Logarithms of the weights after this batch, which sum to 1."""
        before = torch.tensor(self._log_weights or [0.0] * len(scores_MB), dtype=torch.float64)
        return (before - self.rate * scores_MB.double().mean(dim=1)).log_softmax(dim=0)
