"""Runs combinations in launches of one number of ranks, for as long as there is time."""

from __future__ import annotations

import json
import queue
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from tests.helpers.combinations.settings import LAYOUTS, Setting
from tests.helpers.ranks.launch import Launch, start

# A launch starts in seconds and is shared by so many; more would put off what the order has next.
BATCH = 48
POLL_SECONDS = 0.2
# Combinations take seconds. Ranks that wait for each other in different collectives would wait for ever.
STALL_SECONDS = 120.0


@dataclass(frozen=True)
class Outcome:
    """What came of one combination."""

    setting: Setting
    errors: dict[str, float] = field(default_factory=dict)  # by check
    worst: float = float("inf")  # of error / tolerance
    check: str = ""  # that has the worst
    seconds: float = 0.0
    error: str | None = None  # why there are no numbers

    @property
    def failed(self) -> bool:
        """Whether it disagrees with the reference, or did not run."""
        return not self.worst <= 1.0


def read(path: Path) -> list[Outcome]:
    """What earlier sweeps wrote."""
    if not path.exists():
        return []
    lines = path.read_text(encoding="utf-8").splitlines()
    found = [json.loads(line) for line in lines]
    return [Outcome(**{**line, "setting": Setting(**line["setting"])}) for line in found]


def write(path: Path, outcome: Outcome) -> None:
    """Add a line."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(outcome)) + "\n")


def batches(order: Sequence[Setting], size: int = BATCH) -> list[list[Setting]]:
    """``order`` in pieces, each split by the number of ranks."""
    result = []
    for first in range(0, len(order), size):
        piece = order[first : first + size]
        for ranks in sorted({LAYOUTS[setting.layout].ranks for setting in piece}):
            result.append([setting for setting in piece if LAYOUTS[setting.layout].ranks == ranks])
    return result


class Sweep:
    """Runs batches side by side and hands on what comes of each combination."""

    def __init__(self, models: Path, report: Callable[[Outcome], None], seconds: float) -> None:
        """``models``: folder of ``write_models``. ``report`` is called by one thread at a time."""
        self._models = models
        self._report = report
        self._lock = threading.Lock()
        self._deadline = time.monotonic() + seconds
        self._stopped = threading.Event()

    def run(self, order: Sequence[Setting], workers: int) -> None:
        """Run ``order`` until its end or that of the time."""
        waiting: queue.SimpleQueue[list[Setting]] = queue.SimpleQueue()
        for batch in batches(order):
            waiting.put(batch)
        with ThreadPoolExecutor(workers) as pool:
            futures = [pool.submit(self._work, waiting) for _ in range(workers)]
            try:
                for future in futures:
                    future.result()
            finally:  # an interrupt, or a mistake of ours in one thread, ends the others
                self._stopped.set()

    def _work(self, waiting: queue.SimpleQueue[list[Setting]]) -> None:
        while not self._over():
            try:
                batch = waiting.get_nowait()
            except queue.Empty:
                return
            while batch and not self._over():
                batch = self._launch(batch)

    def _over(self) -> bool:
        return self._stopped.is_set() or time.monotonic() >= self._deadline

    def _launch(self, batch: list[Setting]) -> list[Setting]:
        """Run ``batch``; what is left of it where a combination took the launch down with it."""
        jobs = [
            ("check_combination", {**_arguments(setting), "models": str(self._models)}) for setting in batch
        ]
        with tempfile.TemporaryDirectory() as folder:
            running = start(LAYOUTS[batch[0].layout].ranks, jobs, Path(folder))
            ordered = [batch[index] for index in running.order]
            try:
                done, ending = self._follow(running, ordered)
            finally:
                running.stop()
        if ending is not None and done < len(ordered):
            self._tell(Outcome(ordered[done], error=ending))
            done += 1
        return ordered[done:]

    def _follow(self, running: Launch, ordered: list[Setting]) -> tuple[int, str | None]:
        """Hand on results as they come: how many came, and what ended the launch if not the time."""
        done, latest = 0, time.monotonic()
        while not self._over():
            runs = running.runs(POLL_SECONDS)
            results = running.results()
            for setting, result in zip(ordered[done:], results[done:], strict=False):
                self._tell(_outcome(setting, result))
                latest = time.monotonic()
            done = len(results)
            if not runs:
                return done, f"the ranks ended\n{running.report()}"
            if time.monotonic() - latest > STALL_SECONDS:
                running.stop()
                return done, f"no end within {STALL_SECONDS:.0f} s\n{running.report()}"
        return done, None

    def _tell(self, outcome: Outcome) -> None:
        with self._lock:
            self._report(outcome)


def _arguments(setting: Setting) -> dict[str, Any]:
    layout = LAYOUTS[setting.layout]
    return {"setting": setting.values, "layout": layout.parallel}


def _outcome(setting: Setting, line: dict[str, Any]) -> Outcome:
    if "error" in line:
        return Outcome(setting, seconds=line["seconds"], error=line["error"])
    return Outcome(setting, **line["result"], seconds=line["seconds"])
