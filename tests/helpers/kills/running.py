"""Starts a run, disturbs it where its observer has stopped it, and waits until nothing of it is left."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.helpers import forking
from tests.helpers.environment import ROOT, SETTINGS
from tests.helpers.kills import observer
from tests.helpers.kills.cases import LAYOUTS, Kill
from tests.helpers.kills.observer import COUNTS, HIT, VARIABLE, ranks_file
from tests.helpers.kills.phases import THREADED, TIMED, places

ENDS_WITHIN = 400.0  # seconds: torchrun waits 240 for its processes, and may be slow
CONFIG = "config.yaml"
_LOADING = 200_000  # events of a rank that loads a checkpoint, or more
_SITE = Path(__file__).parent / "site"


@dataclass
class Attempt:
    """What became of one start of the command.

    Attributes:
        code: of the command, negative for a signal; None: it had to be killed.
        hit: where the observed rank was stopped; None: it did not come there.
        sent: the first signal, to whom.
    """

    code: int | None
    log: str
    seconds: float
    hit: dict[str, Any] | None = None
    sent: list[str] | None = None
    left: list[str] | None = None  # processes that were still there in the end


class Run:
    """One run in ``folder``, whose command is given as often as asked for."""

    def __init__(self, folder: Path, layout: str, start: str, cache: Path) -> None:
        """``start``: "command", or "forked" without the time that imports take."""
        self.folder = folder
        self.directory = folder / "run"
        self._layout = LAYOUTS[layout]
        self._start = start
        self._attempts = 0
        self._variables = {**SETTINGS, "GAPO_MEGA_CACHE": str(cache)}

    def attempt(self, kill: Kill | None = None, counts: dict[str, list[int]] | None = None) -> Attempt:
        """Give the command once. ``kill``: what to do to it; ``counts``: of the undisturbed run."""
        begun = time.monotonic()
        self._attempts += 1
        plan = self._plan(kill, counts)
        log = self.folder / f"log-{self._attempts}.txt"
        process = self._begin(plan, log)
        found = Attempt(None, "", 0.0)
        try:
            self._follow(process, kill, Path(plan["folder"]), found)
        except BaseException:  # nobody else would end it, or let what is stopped go on
            _end_now([*psutil.Process(process).children(recursive=True), psutil.Process(process)])
            raise
        found.log = log.read_text(errors="replace")
        found.seconds = time.monotonic() - begun
        return found

    def _follow(self, process: int, kill: Kill | None, folder: Path, found: Attempt) -> None:
        """Disturb the run, and wait until nothing is left of it."""
        family = [psutil.Process(process)]
        if kill is not None:
            found.hit = self._wait_for_hit(folder, process, kill.observed)
            if found.hit is not None:
                family += family[0].children(recursive=True)
                found.sent = self._send(kill, folder, process)
        found.code = forking.wait(process, ENDS_WITHIN)
        found.left = _end(family)
        if found.code is None:
            forking.wait(process, 60.0)

    def observe(self) -> tuple[Attempt, dict[str, list[int]]]:
        """Give the command and count the events of its phases on rank 0."""
        found = self.attempt(counts={})
        counts = self.folder / f"plan-{self._attempts}" / COUNTS
        return found, json.loads(counts.read_text()) if counts.is_file() else {}

    # -- starting ------------------------------------------------------------------------------------
    def _plan(self, kill: Kill | None, counts: dict[str, list[int]] | None) -> dict[str, Any]:
        folder = self.folder / f"plan-{self._attempts}"
        folder.mkdir()
        plan: dict[str, Any] = {"folder": str(folder), "launched": self._layout.nproc > 0, "observed": -1}
        if counts is None:
            return plan
        plan |= {"observed": 0, "places": places(), "timed": TIMED}
        plan["threaded"] = THREADED if self._layout.background else []  # else no other thread is slowed down
        if kill is not None:
            plan |= {"observed": kill.observed, "stop": self._stop(kill, counts)}
        return plan

    def _stop(self, kill: Kill, counts: dict[str, list[int]]) -> dict[str, Any]:
        """The occurrence and the event at which the observed rank stops, or at the occurrence's end."""
        known = counts.get(kill.phase, [])
        if kill.phase == "resume":
            # A run that goes on loads, which the undisturbed one does not: places of all orders of size.
            which = int(kill.which * (len(known) if kill.observed == 0 else len(known) - 1))
            return {"phase": kill.phase, "occurrence": which + 1, "event": int(_LOADING**kill.how_far)}
        if self._attempts > 1:
            known = known[:1]  # how many there will be is not known
        which = int(kill.which * len(known))
        event = int(kill.how_far * known[which]) if known else 0
        if kill.phase in TIMED:
            event = int(0.8 * event)  # what is known of it includes the end of the process
        return {"phase": kill.phase, "occurrence": which + 1, "event": event}

    def _begin(self, plan: dict[str, Any], log: Path) -> int:
        words = ["train", "--config", CONFIG]
        if self._layout.nproc:
            words += ["--nproc", str(self._layout.nproc)]
        variables = {**self._variables, VARIABLE: json.dumps(plan)}
        if self._start == "forked":
            environment = {**os.environ, **variables}
            folder, output = str(self.folder), str(log)
            order = forking.Order(words, environment, folder, output, output, self._layout.nproc)
            return forking.start(order, observer.begin)
        variables["PYTHONPATH"] = f"{_SITE}:{ROOT}"
        with log.open("ab") as file:
            return subprocess.Popen(
                [sys.executable, "-m", "gapo_mega.cli", *words],
                cwd=self.folder,
                env={**os.environ, **variables},
                stdin=subprocess.DEVNULL,
                stdout=file,
                stderr=file,
                start_new_session=True,
                preexec_fn=_default_signals,
            ).pid

    # -- disturbing ----------------------------------------------------------------------------------
    def _wait_for_hit(self, folder: Path, process: int, observed: int) -> dict[str, Any] | None:
        """Where the observed rank has stopped; None where the run has ended before, or takes too long."""
        end = time.monotonic() + ENDS_WITHIN
        while time.monotonic() < end and _lives(process):
            if (folder / HIT).exists() and _stopped(_rank(folder, observed)):
                place: dict[str, Any] = json.loads((folder / HIT).read_text())
                return place
            time.sleep(0.005)
        return None

    def _send(self, kill: Kill, folder: Path, launcher: int) -> list[str]:
        """Signal whom the kill names, and let the stopped process go on. Returns who got the first one."""
        ranks = {f"rank {rank}": _rank(folder, rank) for rank in range(self._layout.ranks)}
        if kill.target == "launcher":
            chosen = {"launcher": launcher}
        elif kill.target == "rank":
            chosen = {f"rank {kill.victim}": ranks[f"rank {kill.victim}"]}
        else:
            chosen = ranks | ({"launcher": launcher} if kill.target == "all" else {})
        for process in chosen.values():
            os.kill(process, kill.number)
        _signal(ranks[f"rank {kill.observed}"], signal.SIGCONT)
        if kill.again is not None:
            time.sleep(kill.again)
            for process in chosen.values():
                if _lives(process):
                    _signal(process, kill.number)
        return list(chosen)


def _rank(folder: Path, rank: int) -> int:
    """The process of a rank. Ranks start together, but not at the same moment."""
    path = folder / ranks_file(rank)
    end = time.monotonic() + 60.0
    while not path.exists() and time.monotonic() < end:
        time.sleep(0.01)
    return int(path.read_text())


def _signal(process: int, number: signal.Signals) -> None:
    with suppress(ProcessLookupError):
        os.kill(process, number)


def _status(process: int) -> str | None:
    try:
        return str(psutil.Process(process).status())
    except psutil.NoSuchProcess:
        return None


def _lives(process: int) -> bool:
    """Whether it has not ended; nobody has to have asked for its exit code."""
    return _status(process) not in (None, psutil.STATUS_ZOMBIE)


def _stopped(process: int) -> bool:
    return _status(process) == psutil.STATUS_STOPPED


def _end(family: Sequence[psutil.Process]) -> list[str]:
    """Wait until all have ended; end what does not, and name it."""
    end = time.monotonic() + ENDS_WITHIN
    while (
        left := [one for one in family if one.is_running() and _lives(one.pid)]
    ) and time.monotonic() < end:
        time.sleep(0.02)
    _end_now(left)
    return [f"process {one.pid}" for one in left]


def _end_now(family: Sequence[psutil.Process]) -> None:
    for one in family:
        with suppress(psutil.NoSuchProcess):
            one.kill()


def _default_signals() -> None:
    """Not those that a shell has told this process to ignore, as under nohup."""
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)
