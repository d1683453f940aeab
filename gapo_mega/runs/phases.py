"""Wall time by phase of an update, for the log."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from gapo_mega.whereabouts import within


class Phases:
    """Seconds by phase since the last ``restart``; phases of one name add up."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._started = time.perf_counter()

    def restart(self) -> None:
        """Begin the next update."""
        self.seconds = {}
        self._started = time.perf_counter()

    def total(self) -> float:
        """Seconds since the last ``restart``, phases or not."""
        return time.perf_counter() - self._started

    @contextmanager
    def __call__(self, name: str) -> Iterator[None]:
        """Add the block's time to phase ``name``; work queued on a GPU counts to the block."""
        started = time.perf_counter()
        with within(name):
            yield
            if torch.cuda.is_available():
                torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started
