"""Whether this process was asked to stop: what waits for others, such as a service, asks from time to time.

A run tells by ``asked_by`` whom to ask; outside of runs nobody ever asks to stop.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from gapo_mega.whereabouts import get_on

_BETWEEN_LOOKS = 0.2  # seconds
_asked: list[Callable[[], bool]] = []  # the innermost run's is the last


class StoppedWaiting(Exception):
    """A wait was given up, because the run was asked to stop."""


@contextmanager
def asked_by(asked: Callable[[], bool]) -> Iterator[None]:
    """Within: waits end as soon as ``asked`` is true. It is called on any thread."""
    _asked.append(asked)
    try:
        yield
    finally:
        _asked.pop()


def wait(seconds: float) -> None:
    """Sleep. Raises ``StoppedWaiting`` once the run is asked to stop."""
    end = time.monotonic() + seconds
    while True:
        get_on()
        if _asked and _asked[-1]():
            raise StoppedWaiting("asked to stop while waiting")
        left = end - time.monotonic()
        if left <= 0:
            return
        time.sleep(min(left, _BETWEEN_LOOKS))
