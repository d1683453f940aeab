"""Whether this process was asked to stop: what waits for others, such as a service, asks from time to time.

A run tells by ``asked_by`` whom to ask; outside of runs nobody ever asks to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gapo_mega.whereabouts import get_on

BETWEEN_LOOKS = 0.2  # seconds
_asked: list[Callable[[], bool]] = []  # the innermost run's is the last


class StoppedWaiting(Exception):
    """A wait was given up, because the run was asked to stop."""

    def __init__(self) -> None:
        super().__init__("asked to stop while waiting")


@contextmanager
def asked_by(asks: Callable[[], bool]) -> Iterator[None]:
    """Within: waits end as soon as ``asks`` is true. It is called on any thread."""
    _asked.append(asks)
    try:
        yield
    finally:
        _asked.pop()


def asked() -> bool:
    """Whether the run is asked to stop. May be called on any thread."""
    return any(asks() for asks in _asked[-1:])


def wait(seconds: float) -> None:
    """Sleep. Raises ``StoppedWaiting`` once the run is asked to stop."""
    end = time.monotonic() + seconds
    while True:
        get_on()
        if asked():
            raise StoppedWaiting
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, BETWEEN_LOOKS))
