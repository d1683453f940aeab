"""Inside a run: tells its phases by the functions that its threads are in, and stops it at a chosen place.

It sees what a profiler sees (``sys.setprofile``), so that the package needs to know nothing of it. A place is
the n-th event, such as a call or a return, in a phase: the same on a busy machine as on a quiet one. There
the process writes where it is and sends itself SIGSTOP; what happens then is up to whoever waits for it.
Of a timed phase, a place is so many milliseconds of the processor after its beginning, and nothing is
observed after it. A threaded phase is one of another thread than the main one, whose place is then left to
the system.

Imports nothing but the standard library: it is loaded at the start of every process.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import sys
import threading
import time
from types import FrameType
from typing import Any

VARIABLE = "GAPO_TEST_KILLS"  # the plan, as JSON, in the environment of the processes of a run
HIT, COUNTS = "hit.json", "counts.json"  # files in the plan's folder, and one a rank with its process
_SHOWN = 5  # functions of a stack


def ranks_file(rank: int) -> str:
    """Where a rank's process is told."""
    return f"rank-{rank}.pid"


class _Stack(threading.local):
    """Of every thread: phases that have begun, with the frames they began in."""

    def __init__(self) -> None:
        self.phases: list[tuple[FrameType, str]] = []


class Observer:
    """Counts the events of every phase, and stops at one of them.

    Events belong to the innermost phase; every entry into it is one occurrence.
    """

    def __init__(self, plan: dict[str, Any]) -> None:
        self._places: dict[str, dict[str, str]] = plan["places"]
        self._stop: dict[str, Any] | None = plan.get("stop")
        self._folder: str = plan["folder"]
        self._own = _Stack()
        self._main = threading.get_ident()
        self._timed: list[str] = plan.get("timed", [])
        self._threaded: list[str] = plan.get("threaded", [])
        self._began: tuple[str, float] | None = None  # the timed phase
        self.counts: dict[str, list[int]] = {}  # events, by phase and occurrence

    def start(self) -> None:
        """Observe this thread from now on; where there are threaded phases, also those that begin later."""
        if self._threaded:
            threading.setprofile(self._profile)
        sys.setprofile(self._profile)

    def _profile(self, frame: FrameType, event: str, argument: object) -> None:
        if event == "call":
            files = self._places.get(frame.f_code.co_name)
            if files is not None:
                self._enter(frame, files)
        if self._own.phases:
            self._count(frame, event, argument)

    def _enter(self, frame: FrameType, files: dict[str, str]) -> None:
        phase = next((files[end] for end in files if frame.f_code.co_filename.endswith(end)), None)
        stack = self._own.phases
        if phase is None or (phase in self._threaded) == (threading.get_ident() == self._main):
            return
        if not (stack and stack[-1][1] == phase):
            stack.append((frame, phase))
            self.counts.setdefault(phase, []).append(0)
            if phase in self._timed:
                self._time(phase)

    def _time(self, phase: str) -> None:
        """From here on the clock tells, not a profiler, which would make it several times as long."""
        sys.setprofile(None)
        self._own.phases.clear()
        self._began = (phase, begun := time.process_time())
        stop, main = self._stop, threading.get_ident()
        if stop is not None and stop["phase"] == phase:

            def halt() -> None:
                while time.process_time() < begun + stop["event"] / 1000:
                    time.sleep(0.005)
                self.counts[phase][-1] = stop["event"]
                self._halt(sys._current_frames()[main], "time", None, phase)

            threading.Thread(target=halt, daemon=True).start()

    def tell(self) -> None:
        """Write how many events every phase had, and milliseconds the timed one."""
        sys.setprofile(None)
        if self._began is not None:
            phase, begun = self._began
            self.counts[phase][-1] = int(1000 * (time.process_time() - begun))
        _write(os.path.join(self._folder, COUNTS), json.dumps(self.counts))

    def _count(self, frame: FrameType, event: str, argument: object) -> None:
        entered, phase = self._own.phases[-1]
        counts = self.counts[phase]
        ends = event == "return" and frame is entered
        stop = self._stop
        there = stop is not None and stop["phase"] == phase and stop["occurrence"] == len(counts)
        if stop is not None and there and (counts[-1] >= stop["event"] or ends):
            self._stop = None
            self._halt(frame, event, argument, phase)
        counts[-1] += 1
        if ends:
            self._own.phases.pop()

    def _halt(self, frame: FrameType, event: str, argument: object, phase: str) -> None:
        sys.setprofile(None)
        names = []
        inner: FrameType | None = frame
        while inner is not None and len(names) < _SHOWN:
            names.append(inner.f_code.co_name)
            inner = inner.f_back
        if event.startswith("c_"):
            names.insert(0, str(getattr(argument, "__qualname__", argument)))
        about = {
            "phase": phase,
            "occurrence": len(self.counts[phase]),
            "event": self.counts[phase][-1],
            "when": event,
            "functions": names,
            "place": str(sys.modules["gapo_mega.whereabouts"].here()),
        }
        _write(os.path.join(self._folder, HIT), json.dumps(about))
        os.kill(os.getpid(), signal.SIGSTOP)


def _write(path: str, text: str) -> None:
    with open(f"{path}.new", "w", encoding="utf-8") as file:
        file.write(text)
    os.rename(f"{path}.new", path)


def begin(environment: dict[str, str] | os._Environ[str] = os.environ) -> None:
    """What every process of a run does first: tell its rank's process, and be observed if it is to be."""
    text = environment.get(VARIABLE)
    if text is None:
        return
    plan = json.loads(text)
    if plan["launched"] and "RANK" not in environment:
        return  # the launcher
    rank = int(environment.get("RANK", "0"))
    _write(os.path.join(plan["folder"], ranks_file(rank)), str(os.getpid()))
    if plan["observed"] != rank:
        return
    observer = Observer(plan)
    atexit.register(observer.tell)
    observer.start()
