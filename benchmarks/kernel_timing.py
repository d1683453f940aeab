"""Interleaved timing, and the figures that follow from the times."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol

import torch

Kind = Literal["ours", "ceiling", "arithmetic", "peer"]

# A turn's calls take about this long together: one call of a few microseconds tells too little.
TURN_SECONDS = 0.004
MOST_CALLS = 50
SHORT_SECONDS = 0.05  # calls up to here come at least three at a time, after one that is not timed
CUDA_CALLS = 20  # at least, over all rounds
# torch's worker threads spin for a while after their work, on the cores that the next contender needs.
PAUSE_SECONDS = 0.02


@dataclass(frozen=True)
class Contender:
    """Something to time. ``setup_bytes``: memory that it needed before the first call."""

    name: str
    kind: Kind
    run: Callable[[], Any]
    setup_bytes: int = 0


@dataclass
class Times:
    """Seconds by contender, one number per round, and the errors of contenders that failed."""

    seconds: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def medians(self) -> dict[str, float]:
        """The median over rounds, per contender."""
        return {name: statistics.median(rounds) for name, rounds in self.seconds.items()}


class Clock(Protocol):
    """How calls are timed on a device."""

    def calls(self, seconds: float) -> int:
        """How many calls of ``seconds`` a turn has."""

    def turn(self, run: Callable[[], Any], prepare: Callable[[], Any], calls: int) -> list[float]:
        """Seconds of every call; ``prepare`` comes before each and is not timed."""


class CpuClock:
    """Wall time."""

    def __init__(self, threads: int) -> None:
        self._pause = PAUSE_SECONDS if threads > 1 else 0.0

    def calls(self, seconds: float) -> int:
        """At least three where one is short."""
        if seconds > SHORT_SECONDS:
            return 1
        return max(3, min(MOST_CALLS, math.ceil(TURN_SECONDS / max(seconds, 1e-9))))

    def turn(self, run: Callable[[], Any], prepare: Callable[[], Any], calls: int) -> list[float]:
        """Short calls come after one that is not timed, which meets the previous contender's caches."""
        time.sleep(self._pause)
        seconds = []
        for call in range(calls if calls == 1 else calls + 1):
            prepare()
            start = time.perf_counter()
            result = run()
            elapsed = time.perf_counter() - start
            del result  # gigabytes, where it is a stack of rows
            if calls == 1 or call:
                seconds.append(elapsed)
        return seconds


class CudaClock:
    """Events on the current stream."""

    def __init__(self, rounds: int) -> None:
        self._least = math.ceil(CUDA_CALLS / rounds)

    def calls(self, seconds: float) -> int:
        """Enough for all rounds together to have ``CUDA_CALLS``."""
        return max(self._least, min(MOST_CALLS, math.ceil(TURN_SECONDS / max(seconds, 1e-9))))

    def turn(self, run: Callable[[], Any], prepare: Callable[[], Any], calls: int) -> list[float]:
        """A first call is not timed."""
        prepare()
        run()
        torch.cuda.synchronize()
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(calls)]
        for start, end in events:
            prepare()
            start.record()
            run()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]


def clock(device: str, threads: int, rounds: int) -> Clock:
    """The device's clock."""
    return CudaClock(rounds) if device == "cuda" else CpuClock(threads)


def nothing() -> None:
    """Do nothing: there is nothing to prepare or to report."""


def time_rounds(
    contenders: Sequence[Contender],
    with_clock: Clock,
    rounds: int,
    prepare: Callable[[], Any] = nothing,
    on_round: Callable[[], Any] = nothing,
) -> Times:
    """Time every contender once per round, in turn, so that changes of the machine meet all alike.

    A warm-up round decides how many calls a turn has. A peer that raises takes no further part and has
    no figures; errors of ours and of the ceilings end the benchmark.
    """
    times = Times({contender.name: [] for contender in contenders})
    calls: dict[str, int] = {}

    def turn(contender: Contender) -> None:
        if contender.name in calls:
            seconds = with_clock.turn(contender.run, prepare, calls[contender.name])
            times.seconds[contender.name].append(statistics.median(seconds))
            return
        seconds = with_clock.turn(contender.run, prepare, 1)  # allocates, loads, starts threads
        if seconds[0] < SHORT_SECONDS:
            seconds += with_clock.turn(contender.run, prepare, 3)
        calls[contender.name] = with_clock.calls(min(seconds))

    for _ in range(rounds + 1):
        for contender in contenders:
            if contender.name in times.failed:
                continue
            try:
                turn(contender)
            except Exception as error:
                if contender.kind != "peer":
                    raise
                times.failed[contender.name] = f"{type(error).__name__}: {error}".splitlines()[0]
                del times.seconds[contender.name]
        on_round()
    return times


# --- figures, from times alone ----------------------------------------------------------------------


def gram_bytes(m: int, n: int, element_bytes: int) -> int:
    """Every row is read once."""
    return m * n * element_bytes


def combine_bytes(m: int, n: int, element_bytes: int) -> int:
    """Every row is read and one is written."""
    return (m + 1) * n * element_bytes


def step_bytes(m: int, n: int, element_bytes: int) -> int:
    """A Gram matrix and a combination."""
    return gram_bytes(m, n, element_bytes) + combine_bytes(m, n, element_bytes)


def multiply_adds(m: int, n: int) -> int:
    """Multiply-adds of a symmetric Gram matrix."""
    return n * m * (m + 1) // 2


def figures(
    contenders: Sequence[Contender],
    times: Times,
    moved_bytes: int,
    needed: int = 0,
    arithmetic: int = 0,
) -> list[dict[str, Any]]:
    """A record per contender: median seconds, GB/s, and how it compares.

    ``fraction_of_ceiling`` is the best ceiling's time over the contender's own, ``times_ours`` the
    contender's time over ours. ``fraction_of_roofline`` replaces the ceiling's time by the time of the
    arithmetic where that is longer: ``needed`` multiply-adds, at the rate of the contender of kind
    "arithmetic", which does ``arithmetic`` of them.
    """
    medians = times.medians()
    kinds = {contender.name: contender.kind for contender in contenders}
    ceiling = min((medians[name] for name in medians if kinds[name] == "ceiling"), default=math.nan)
    (ours,) = (medians[name] for name in medians if kinds[name] == "ours")
    rate = next((arithmetic / medians[name] for name in medians if kinds[name] == "arithmetic"), math.nan)
    records = []
    for name, seconds in medians.items():
        record: dict[str, Any] = {
            "contender": name,
            "kind": kinds[name],
            "seconds": seconds,
            "round_seconds": times.seconds[name],
        }
        if kinds[name] == "arithmetic":
            record["multiply_adds_per_second"] = rate
        else:
            record["gb_per_second"] = moved_bytes / seconds / 1e9
            record["times_ours"] = seconds / ours
            if not math.isnan(ceiling):
                record["fraction_of_ceiling"] = ceiling / seconds
            if not math.isnan(rate):
                record["fraction_of_roofline"] = max(ceiling, needed / rate) / seconds
        records.append(record)
    records += [{"contender": name, "kind": kinds[name], "failed": why} for name, why in times.failed.items()]
    return records
