"""What makes a scalarizer safe: its weights, raised for the objectives that their sum would hurt."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation import safe_weights
from gapo_mega.aggregation.on_host import HostMethod, Solution
from gapo_mega.ops import Aggregated, Status, beyond_range


@dataclass(kw_only=True)
class SafeWeights(HostMethod):
    """``w = argmin v' G v subject to v >= w0``, where ``w0`` are the weights that ``take`` was given last.

    Of all directions that hurt no objective to first order, the nearest to ``sum_i w0_i g_i``. An objective
    with ``w0_i <= 0`` is not followed, but not hurt either. Until ``take`` every objective has 1/M.

    It has no memory: every rollout gives weights anew, and a resumed run begins with one.
    """

    name: ClassVar[str] = "safe_weights"
    in_every_audit: ClassVar[bool] = False

    _given: Tensor | None = field(default=None, init=False, repr=False, compare=False)

    def take(self, weights_M: Tensor) -> None:
        """Start from ``weights_M`` [M], finite, of any sign, until the next call."""
        self._given = weights_M.to("cpu", torch.float64)

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        count = len(active)
        given = torch.full((count,), 1.0 / count, dtype=torch.float64)
        if self._given is not None:
            given = self._given[list(active)]
        return Solution(safe_weights(gram, given))

    def error(self, found: Aggregated) -> ValueError:
        if Status(int(found.status)) != Status.OUT_OF_RANGE:
            return super().error(found)
        return ValueError(
            f"scalarization.options.safe: found true, with which an update has {beyond_range(found)}; "
            "accepted: false, or objectives whose gradients are of less different lengths"
        )
