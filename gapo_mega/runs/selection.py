"""Which evaluation of a run is the best so far, and whether better ones have been waited for long enough."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any

from gapo_mega.evaluation.criterion import Rank
from gapo_mega.evaluation.standing import Best

logger = logging.getLogger(__name__)


class Selection:
    """The best evaluation by one criterion. The same on every rank; checkpoints hold it.

    Attributes:
        best: None before the first evaluation, and without a criterion.
    """

    def __init__(self, by: str | None, patience: int | None) -> None:
        """``by`` None: nothing is chosen. ``patience``: evaluations without a new best that end a run."""
        self.by = by
        self.patience = patience
        self._forget()

    def _forget(self) -> None:
        self.best: Best | None = None
        self._rank: Rank | None = None
        self._evaluations = 0
        self._in_vain = 0

    def take(self, step: int, rank: Rank) -> None:
        """Note the evaluation after ``step`` steps. Only a higher rank than the best's is a new best."""
        assert self.by is not None
        self._evaluations += 1
        if self._rank is None or rank > self._rank:
            self._rank, self._in_vain = rank, 0
            chosen = step
        else:
            self._in_vain += 1
            assert self.best is not None
            chosen = self.best.step
        self.best = Best(self.by, chosen, self._rank[0], self._evaluations)

    @property
    def kept(self) -> frozenset[int]:
        """Steps whose checkpoints stay."""
        return frozenset() if self.best is None else frozenset({self.best.step})

    @property
    def stops(self) -> bool:
        """Whether the run should end."""
        return self.patience is not None and self._in_vain >= self.patience

    def reason(self) -> str:
        """Why it should."""
        assert self.best is not None
        return (
            f"{self._in_vain} evaluations in a row were not better by {self.best.by} than that of step "
            f"{self.best.step} ({self.best.value:.4g}), and evaluation.early_stopping_patience is "
            f"{self.patience}"
        )

    def lose(self, why: str) -> None:
        """Begin anew, and say why the best so far no longer counts."""
        if self.best is not None:
            logger.warning("%s: the best of the evaluations is chosen anew from here on", why)
        self._forget()

    def state_dict(self) -> dict[str, Any]:
        """For a checkpoint."""
        if self.best is None or self._rank is None:
            return {}
        return {
            "by": self.by,
            "step": self.best.step,
            "rank": list(self._rank),
            "evaluations": self._evaluations,
            "in_vain": self._in_vain,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. What was chosen by another criterion does not count."""
        self._forget()
        if not state:
            return
        self._rank = tuple(state["rank"])
        self._evaluations, self._in_vain = int(state["evaluations"]), int(state["in_vain"])
        self.best = Best(state["by"], int(state["step"]), self._rank[0], self._evaluations)
        if state["by"] != self.by:
            self.lose(f"checkpoint.best was {state['by']} and is {self.by or 'null'}")
