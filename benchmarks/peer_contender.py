"""What the contenders over transformers and over gapo_mega have in common."""

from __future__ import annotations

from typing import Any, Protocol

import torch

from gapo_mega import aggregation
from gapo_mega.engine.base import Aggregator

Seconds = tuple[float, float]  # a whole step, and the optimizer's part of it


class Contender(Protocol):
    """Something that updates a policy."""

    def look(self, scopes: list[Any]) -> dict[str, Any]:
        """Gram matrices at the initial parameters, as lists; not timed.

        ``gram``: what the weights are computed from, None where that is not known; ``exact``: by scope (see
        ``peer_entries.scope_key``), in float64 from the contender's own gradients, where it has them.
        """
        ...

    def step(self) -> Seconds:
        """One update."""
        ...


def gapo() -> Aggregator:
    """The method that ours and the step by hand use."""
    return aggregation.build("gapo", p=1, scale="mean_norm")


def synchronize() -> None:
    """Wait for the GPU, so that a time includes its work."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
