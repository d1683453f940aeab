"""The memory of methods whose weights follow how far every objective's scores have come."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from gapo_mega.aggregation.base import Aggregator
from gapo_mega.progress import Progress


@dataclass(kw_only=True)
class FollowsProgress(Aggregator):
    """A method that keeps its ``Progress`` while ``looks_at_scores`` is true; else it has no memory."""

    _progress: Progress = field(default_factory=Progress, init=False, repr=False, compare=False)

    def begin(self, means_M: Tensor, spreads_M: Tensor) -> None:
        if self.looks_at_scores:
            self._progress.begin(means_M, spreads_M)

    def observe(self, means_M: Tensor, spreads_M: Tensor) -> None:
        if self.looks_at_scores:
            self._progress.observe(means_M, spreads_M)

    def state_dict(self) -> dict[str, Any]:
        progress = self._progress.state_dict()
        return {"progress": progress} if progress else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        if not self.looks_at_scores or set(state) - {"progress"}:
            return super().load_state_dict(state)
        self._progress.load_state_dict(state.get("progress", {}))
