"""A rank's watch over itself: where all ranks hang at once, or the one there is, nobody else could tell."""

from __future__ import annotations

import socket
import threading
import time
from collections.abc import Callable
from datetime import timedelta

from gapo_mega.whereabouts import START, Place, here, moves

_LOOKS = 20  # within the limit
_FASTEST, _SLOWEST = 0.1, 5.0  # seconds between two of them


class OwnWatch:
    """Ends this process if its main thread does not get on for too long, from ``start`` to ``stop``.

    It gets on where it enters or leaves a phase, and wherever ``whereabouts.get_on`` is called. What comes
    before the run has phases, such as reading data, is not limited.
    """

    def __init__(self, rank: int, limit: timedelta, end: Callable[[str], None]) -> None:
        """``end`` ends the process, told why."""
        self._rank = rank
        self._limit = limit.total_seconds()
        self._period = min(max(self._limit / _LOOKS, _FASTEST), _SLOWEST)
        self._end = end
        self._stopping = threading.Event()
        self._thread = threading.Thread(target=self._watch, name="gapo-mega own watch", daemon=True)

    def start(self) -> None:
        """Begin."""
        self._thread.start()

    def stop(self) -> None:
        """End."""
        self._stopping.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def _watch(self) -> None:
        last, waited, before = time.monotonic(), 0.0, _standing()
        while not self._stopping.wait(self._period):
            now, standing = time.monotonic(), _standing()
            # Time in which this process was stopped, as all may have been, is nobody's.
            waited = 0.0 if standing != before else waited + min(now - last, 2 * self._period)
            last, before = now, standing
            if standing[0].phase != START and waited > self._limit:
                self._end(self._told(standing[0]))
                return

    def _told(self, place: Place) -> str:
        since = time.strftime("%H:%M:%S", time.localtime(place.since))
        return (
            f"rank {self._rank} on {socket.gethostname()} has been in {place} since {since} and has not got "
            f"on for {self._limit:g} s (parallel.phase_minutes)"
        )


def _standing() -> tuple[Place, int]:
    return here(), moves()
