"""Wall time of the phases of one update."""

from __future__ import annotations

import time

import torch

from gapo_mega.whereabouts import passed


class Clock:
    """Measures wall time between laps; on a GPU each lap waits for the device."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """Add the time since the last lap to ``name``."""
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        passed(name)
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
