"""Objectives for tests of the trainer: cheap, and at odds with each other."""

from __future__ import annotations

from collections.abc import Sequence


def short(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Fewer characters are better."""
    return [-len(response) / 100 for response in responses]


def vowels(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """More vowels are better."""
    return [sum(response.count(v) for v in "aeiou") / 20 for response in responses]


def overflowing(prompts: Sequence[str], responses: Sequence[str]) -> list[float]:
    """Finite scores whose differences are not: the gradient of this objective is never finite."""
    return [3e38 if index % 2 else -3e38 for index in range(len(responses))]
