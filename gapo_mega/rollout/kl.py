"""The coefficient of the divergence from the reference, fixed or steered to a target."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

_MOST = 0.2  # how much of the target the error counts at most
_MOST_AT_ONCE = 1.0  # share of the horizon that one rollout counts at most


class KlCoefficient:
    """``kl_beta``, or with a target a proportional controller (Ziegler et al. 2019, arXiv 1909.08593, 2.2).

    After a rollout of n responses ``beta <- beta (1 + clip(KL / target - 1, -0.2, 0.2) n / horizon)``. The
    paper has 0.1 in place of n / horizon, for n about 1,000; its code, and TRL's after it, n / 10,000.

    Attributes:
        value: the coefficient now.
    """

    def __init__(self, beta: float, target: float | None = None, horizon: int = 10_000) -> None:
        self.value = beta
        self._target = target
        self._horizon = horizon

    @property
    def adapts(self) -> bool:
        """Whether there is a target."""
        return self._target is not None

    def observe(self, kl: float, responses: int) -> None:
        """Take note of a rollout: the mean KL of a response in nats, and their number over all ranks.

        Every rank must give the same numbers. A KL that is no number changes nothing.
        """
        if self._target is None or math.isnan(kl):
            return
        error = min(_MOST, max(-_MOST, kl / self._target - 1.0))
        self.value *= 1.0 + error * min(_MOST_AT_ONCE, responses / self._horizon)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint must hold: nothing where there is no target."""
        return {"beta": self.value} if self.adapts else {}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``; a state without a coefficient leaves the configuration's."""
        if self.adapts and "beta" in state:
            self.value = float(state["beta"])
