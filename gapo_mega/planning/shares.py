"""Which items of a list a data rank computes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

_T = TypeVar("_T")


def share(items: Sequence[_T], rank: int, ranks: int, in_step: bool) -> tuple[list[_T], int]:
    """The items that data rank ``rank`` of ``ranks`` computes, and how many of the first are its own.

    ``in_step``: every rank computes equally many (data ranks that share experts wait for each other in every
    forward). Those behind a rank's own are computed for the others' sake, and belong to another rank.
    """
    own = list(items[rank::ranks])
    missing = -(-len(items) // ranks) - len(own) if in_step else 0
    return [*own, *items[:missing]], len(own)
