"""Waits of all ranks that no collective's time limit ends.

A rank that waits for something outside of the job takes part in a round every minute, and says for what it
waits. So those that wait for it are in no collective longer than that.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

from gapo_mega.engine.base import Ranks
from gapo_mega.whereabouts import get_on

logger = logging.getLogger(__name__)

_FIRST, _FURTHER = 30.0, 60.0  # seconds


@dataclass(frozen=True)
class Said:
    """What a data-parallel rank says in a round: for what it still waits, or what it has found."""

    waits: str | None = None
    found: Any = None


def pauses(limit: timedelta) -> Iterator[float]:
    """Seconds before each round; all are far below ``limit``, the longest that a collective may take."""
    most = limit.total_seconds() / 3
    yield min(_FIRST, most)
    while True:
        yield min(_FURTHER, most)


def still_waits(ranks: Ranks, what: str) -> None:
    """A round in which this rank waits. Collective; replicas that do not wait are in ``gathered``."""
    _round(ranks, Said(waits=what))


def gathered(ranks: Ranks, found: Any) -> list[Any]:
    """What all data-parallel ranks have found, however long some of them still wait. Collective."""
    while True:
        told = _round(ranks, Said(found=found))
        if all(said.waits is None for said in told):
            return [said.found for said in told]


def wait_for_all(
    ranks: Ranks, wait: Callable[[float], bool], what: Callable[[], str], limit: timedelta
) -> None:
    """Wait until ``wait(seconds)`` is true on the first rank of every replica; ``what``: for. Collective."""
    for seconds in pauses(limit):
        come = ranks.broadcast_in_replica(wait(seconds))
        if all(said.waits is None for said in _round(ranks, Said(waits=None if come else what()))):
            return


def _round(ranks: Ranks, own: Said) -> list[Said]:
    told = ranks.gather_over_data(own)
    get_on()
    waiting = [said.waits for said in told if said.waits is not None]
    if waiting and ranks.layout.is_main:
        logger.info("%s", "; ".join(waiting))
    return told
