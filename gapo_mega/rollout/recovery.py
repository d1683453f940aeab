"""Rollouts that survive the loss of a server."""

from __future__ import annotations

import logging
from collections.abc import Callable
from itertools import count
from typing import TypeVar

from gapo_mega.engine.base import Ranks
from gapo_mega.rollout.response_scores import sendable
from gapo_mega.rollout.rounds import gathered
from gapo_mega.rollout.servers.lost import ServerLost

logger = logging.getLogger(__name__)

Result = TypeVar("Result")
_ATTEMPTS = 3


def recovered(ranks: Ranks, update_weights: Callable[[], None], work: Callable[[], Result]) -> Result:
    """What ``work`` gives this replica; collective over all ranks.

    Where it loses a server on some data-parallel ranks, all of them have the weights taken over anew, which
    starts the server again, and repeat the whole work, three times in all. Where it fails otherwise, all
    raise: their own error, or else the first of the others. Replicas wait for the slowest, however long.
    """
    for attempt in count(1):
        own: Exception | None = None
        try:
            result = work()
        except Exception as error:
            own = error
        told = gathered(ranks, None if own is None else sendable(own))
        failures = [error for error in told if error is not None]
        if not failures:
            return result
        fatal = [error for error in failures if not isinstance(error, ServerLost)]
        if fatal or attempt == _ATTEMPTS:
            mine = own if own is not None and (not fatal or not isinstance(own, ServerLost)) else None
            raise mine if mine is not None else (fatal or failures)[0]
        if ranks.layout.is_main:
            logger.warning("%s; the weights are taken over anew, and all is answered again", failures[0])
        update_weights()
    raise AssertionError("count() has no end")
