"""Of which step held-out numbers are, and how far the run was when they were taken."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class Best:
    """The best evaluation so far.

    Attributes:
        by: ``checkpoint.best``.
        step: rollout steps that its policy has done.
        value: by which it was chosen.
        evaluations: among which it was chosen.
    """

    by: str
    step: int
    value: float
    evaluations: int

    def sentence(self) -> str:
        """For people."""
        several = (
            f"the best of {self.evaluations} evaluations" if self.evaluations > 1 else "the only evaluation"
        )
        return f"step {self.step}, {several} by {self.by} ({self.value:.4g})"


@dataclass(frozen=True)
class Standing:
    """The step of held-out numbers "after training", and that of the run.

    Attributes:
        step: rollout steps that the policy with these numbers has done.
        done: rollout steps that the run has done.
        total: rollout steps that it was asked for.
        ended: whether it has come to its end.
        best: where the run chooses one.
    """

    step: int
    done: int
    total: int
    ended: bool
    best: Best | None = None

    @property
    def stopped_early(self) -> bool:
        """Whether the run ended before the steps it was asked for."""
        return self.ended and self.done < self.total

    @property
    def label(self) -> str:
        """What stands above numbers of ``step``."""
        if not self.ended:
            return f"step {self.step}"
        return "after" if self.step == self.done else f"after (step {self.step})"

    def sentence(self) -> str:
        """How far the run is, for people."""
        if not self.ended:
            return f"Running: step {self.done} of {self.total}"
        early = f" of {self.total}, stopped early" if self.stopped_early else ""
        return f"Ended after step {self.done}{early}"

    def as_dict(self) -> dict[str, Any]:
        """For ``summary.json``."""
        found: dict[str, Any] = {"step": self.step, "steps": self.done, "steps_asked": self.total}
        if self.best is not None:
            found["best"] = asdict(self.best)
        return found

    @classmethod
    def of_summary(cls, document: Mapping[str, Any]) -> Standing | None:
        """Inverse of ``as_dict``, of a run that has ended; None for a summary of an earlier version."""
        if "step" not in document:
            return None
        best = None if "best" not in document else Best(**document["best"])
        step, done, total = (int(document[key]) for key in ("step", "steps", "steps_asked"))
        return cls(step, done, total, ended=True, best=best)
