"""What a run that ends early still can keep: the state before the step that was cut short."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from gapo_mega.engine.base import RunEngine
from gapo_mega.planning.world import ranks_in_words
from gapo_mega.runs.processes import Peers

LEAVE_WITHIN = 30.0  # seconds that the ranks of a run that ends early have to find one another


@dataclass(frozen=True)
class Before:
    """The state between two steps, models and optimizers aside: those tell by ``changes`` whether they moved.

    Attributes:
        changes: of the engine.
        pickled: the work's state; a copy, for the step that follows changes it.
        random: states of the engine's random-number generators.
    """

    changes: int
    pickled: bytes
    random: dict[str, Any]

    @classmethod
    def of(cls, engine: RunEngine, state: Mapping[str, Any]) -> Before:
        """That of now."""
        return cls(engine.changes, pickle.dumps(dict(state)), engine.random_states())

    def restore(self, engine: RunEngine) -> dict[str, Any]:
        """Set the random numbers back, and return the work's state."""
        engine.restore_random_states(self.random)
        state: dict[str, Any] = pickle.loads(self.pickled)
        return state


def meet(everyone: Peers, step: int, untouched: bool) -> list[Any]:
    """Where every rank stands; None for one that does not come within ``LEAVE_WITHIN``. Once a process.

    Args:
        step: steps that this rank has done.
        untouched: whether it has the models and optimizers that it had after them.
    """
    return everyone.leave([step, untouched], LEAVE_WITHIN)


def absent(told: Sequence[Any]) -> str | None:
    """Which ranks have not come, of those that ``meet`` has told of; None where all have."""
    missing = [rank for rank, value in enumerate(told) if value is None]
    if missing:
        return f"{ranks_in_words(missing)} did not answer within {LEAVE_WITHIN:.0f} s"
    return None


def stand_together(told: Sequence[Any]) -> bool:
    """Whether all ranks have come, after the same step: what is collective can be done."""
    return absent(told) is None and len({value[0] for value in told}) == 1


def obstacle(told: Sequence[Any], step: int, over: bool = False) -> str | None:
    """Why no checkpoint of ``step`` can be written; None where all ranks can.

    Args:
        told: by ``meet``, the same on every rank.
        over: whether ``step`` was the last one: what moves the models after it is the end of the run.
    """
    if all(value == [step, True] for value in told):
        return None
    if over and stand_together(told):
        return f"the state after step {step} is gone: the end had taken the best checkpoint"
    return absent(told) or f"step {step + 1} was cut short after its updates had begun"
