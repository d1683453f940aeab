"""What one rank finds out, on all ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from gapo_mega.rollout.response_scores import sendable

Value = TypeVar("Value")


def from_one(is_one: bool, make: Callable[[], Value], share: Callable[[Any], Any]) -> Value:
    """What ``make`` gives the one rank that calls it, on all that ``share``; its error is raised on all."""
    outcome: Any = None
    if is_one:
        try:
            outcome = make()
        except Exception as error:
            share(sendable(error))
            raise
    outcome = share(outcome)
    if isinstance(outcome, Exception):
        raise outcome
    value: Value = outcome
    return value
