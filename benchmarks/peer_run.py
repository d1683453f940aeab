"""The measurements of benchmarks/peers.py, from settings to one dictionary. Computes nothing itself."""

from __future__ import annotations

import multiprocessing
import os
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest.mock import patch

import peer_figures
import peer_start
import psutil
from peer_entries import STACKED, Entry, entries, has_torchjd, known_strategies
from peer_figures import Record
from peer_jobs import Job, ModelSize, Order
from tqdm import tqdm

HERE = Path(__file__).resolve().parent
PAUSE_SECONDS = 0.02  # the previous contender's threads spin for a while after their work
RESERVE = 1.2  # times the expected need of memory
INSTALL_TORCHJD = (
    "TorchJD is left out, because of torchjd, qpsolvers and quadprog not all are installed: "
    'pip install -e ".[bench]"'
)
LOOKS = ("look", "allocated", "resident")


@dataclass(frozen=True)
class Settings:
    """What to measure. ``size`` is that of the random model."""

    model: str | None
    sequences: int
    length: int
    objectives: list[int]
    rounds: int
    threads: int
    attention: str
    microbatches: int
    strategies: dict[str, dict[str, Any]] = field(default_factory=known_strategies)
    leave_out: list[str] = field(default_factory=list)
    size: dict[str, int] = field(default_factory=dict)

    def check(self) -> None:
        """Raise ``ValueError`` where something does not fit together."""
        if self.sequences % self.microbatches:
            raise ValueError(
                f"microbatches: found {self.microbatches}, accepted: a divisor of {self.sequences} sequences"
            )
        if self.length < 8:
            raise ValueError(f"length: found {self.length}, accepted: 8 or more")
        if self.model is not None and not (Path(self.model) / "config.json").is_file():
            raise ValueError(f"model: {self.model} has no config.json; accepted: a Hugging Face directory")


class Worker:
    """A process forked from the server, and the connection to it."""

    def __init__(self, target: Callable[..., None], name: str, *arguments: Any) -> None:
        context = multiprocessing.get_context("forkserver")
        self.name = name
        self._connection: Connection
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=target, args=(theirs, *arguments), daemon=True)
        self._process.start()
        theirs.close()

    def answer(self) -> Any:
        """What the process says next.

        Raises:
            RuntimeError: it ended without an answer; standard error says why.
        """
        try:
            return self._connection.recv()
        except (EOFError, ConnectionResetError) as error:
            self._process.join()
            raise RuntimeError(f"{self.name}: process ended with {self._process.exitcode}") from error

    def ask(self, request: str) -> Any:
        """Send a request and return the answer."""
        try:
            self._connection.send(request)
        except BrokenPipeError as error:
            self._process.join()
            raise RuntimeError(f"{self.name}: process ended with {self._process.exitcode}") from error
        return self.answer()

    def end(self) -> None:
        """Wait until the process and its memory are gone; kill it if it stays."""
        self._connection.close()
        self._process.join(timeout=30)
        self._process.kill()
        self._process.join()


@contextmanager
def server() -> Iterator[None]:
    """The process that imports everything once and is forked for every task."""
    paths = [str(HERE), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {
        "PYTHONPATH": os.pathsep.join(paths),  # `preload` does not look along our sys.path
        "KINETO_LOG_LEVEL": "99",  # torch's profiler would report on standard error when it starts and stops
    }
    with patch.dict(os.environ, environment):
        multiprocessing.get_context("forkserver").set_forkserver_preload(["peer_worker"])
        forkserver.ensure_running()
        yield


def run(settings: Settings) -> Iterator[dict[str, Any]]:
    """Measure everything; what goes into the JSON file, again after every number of objectives.

    Raises:
        ValueError: settings that do not fit together.
        RuntimeError: gradients that do not agree, or a process that failed.
    """
    settings.check()
    torchjd = has_torchjd()
    entrants = entries(settings.strategies, settings.leave_out, torchjd)
    shown = {**asdict(settings), "model": None if settings.model is None else Path(settings.model).name}
    result: dict[str, Any] = {"settings": shown, "torchjd": torchjd, "records": []}
    total = len(settings.objectives) * len(entrants) * (len(LOOKS) + settings.rounds)
    with (
        tempfile.TemporaryDirectory() as folder,
        server(),
        tqdm(total=total, unit="turn", smoothing=0.05) as bar,
    ):
        bar.set_description("model and batch")
        prepared = prepare(settings, folder)
        result |= {"machine": prepared["machine"], "model": prepared["model"]}
        for m in settings.objectives:
            records = Measurement(settings, prepared, entrants, m, bar).run()
            peer_figures.add_ratios(records, prepared["model"]["gradient_bytes"])
            result["records"] += records
            yield result


def prepare(settings: Settings, folder: str) -> dict[str, Any]:
    """Have a process write model and batch; return the answer of ``peer_worker.prepare``."""
    order = Order(
        folder=folder,
        model=settings.model,
        size=ModelSize(**settings.size),
        sequences=settings.sequences,
        length=settings.length,
        objectives=max(settings.objectives),
        attention=settings.attention,
        threads=settings.threads,
    )
    worker = Worker(peer_start.prepare, "model and batch", order)
    try:
        found: dict[str, Any] = worker.answer()
    finally:
        worker.end()
    return found


class Measurement:
    """All entrants with one number of objectives."""

    def __init__(
        self,
        settings: Settings,
        prepared: dict[str, Any],
        entrants: Sequence[Entry],
        objectives: int,
        bar: tqdm[Any],
    ) -> None:
        self.settings, self.prepared, self.entrants = settings, prepared, entrants
        self.objectives = objectives
        self.bar = bar
        self.records: dict[str, Record] = {}

    def run(self) -> list[Record]:
        """A record per entrant: agreement first, then memory, then time."""
        for entry in self.entrants:
            self.records[entry.name] = {
                "contender": entry.name,
                "stack": entry.stack,
                "kind": entry.kind,
                "options": entry.options,
                "objectives": self.objectives,
                "combines": entry.objectives(self.objectives),
            }
        self._look()
        for task in ("allocated", "resident"):
            for entry in self._remaining():
                self.records[entry.name][task] = self._once(entry, task)
                self._settle(entry, task)
        self._time()
        return list(self.records.values())

    def _remaining(self) -> list[Entry]:
        return [entry for entry in self.entrants if "failed" not in self.records[entry.name]]

    def _settle(self, entry: Entry, task: str) -> None:
        """Where a peer refused the task, keep its words in place of its figures."""
        record = self.records[entry.name]
        if "failed" in record[task]:
            record["failed"] = record.pop(task)["failed"]

    def _worker(self, entry: Entry, task: str) -> Worker:
        scopes: list[Any] = ["full", *(other.scope for other in self.entrants)]
        job = Job(
            entry=entry,
            objectives=self.objectives,
            source=self.prepared["source"],
            batch=self.prepared["batch"],
            threads=self.settings.threads,
            attention=self.settings.attention,
            microbatches=self.settings.microbatches,
            scopes=tuple(scope for i, scope in enumerate(scopes) if scope not in scopes[:i]),
        )
        return Worker(peer_start.work, entry.name, job, task)

    def _once(self, entry: Entry, task: str) -> dict[str, Any]:
        self.bar.set_description(f"m = {self.objectives}: {task}, {entry.name}")
        worker = self._worker(entry, task)
        try:
            found: dict[str, Any] = worker.answer()
        finally:
            worker.end()
            self.bar.update()
        return found

    def _look(self) -> None:
        """Check, before anything is measured, that all work on the same gradients.

        Raises:
            RuntimeError: the step by hand, autojac or ours do not.
        """
        found = {entry.name: self._once(entry, "look") for entry in self.entrants}
        reference = found[STACKED]["exact"]
        self.records[STACKED]["gram"] = reference["full"]
        for entry in self.entrants:
            record, seen = self.records[entry.name], found[entry.name]
            if "failed" in seen:
                record["failed"] = seen["failed"]
                continue
            record["warnings"] = seen["warnings"]
            tied = self.prepared["model"]["tied"]
            record |= peer_figures.agreement(entry, seen, reference, tied)

    def _time(self) -> None:
        """Entrants take turns; their processes stay if all fit into memory, else every turn starts one."""
        entrants = self._remaining()
        resident = [self.records[entry.name]["resident"] for entry in entrants]
        needed = sum(found["idle_bytes"] for found in resident)
        needed += max(found["peak_bytes"] - found["idle_bytes"] for found in resident)
        keep = needed * RESERVE < psutil.virtual_memory().available
        workers: dict[str, Worker] = {}
        times: dict[str, list[tuple[float, float]]] = {entry.name: [] for entry in entrants}
        try:
            for number in range(self.settings.rounds):
                self.bar.set_description(f"m = {self.objectives}: round {number + 1}")
                for entry in self._remaining():
                    taken = self._turn(entry, workers, keep)
                    if taken is not None:
                        times[entry.name].append(taken)
                    self.bar.update()
        finally:
            for worker in workers.values():
                worker.end()
        for entry in self._remaining():
            self.records[entry.name] |= peer_figures.times(times[entry.name])
            self.records[entry.name]["process_kept"] = keep

    def _turn(self, entry: Entry, workers: dict[str, Worker], keep: bool) -> tuple[float, float] | None:
        """Seconds of a step and of its optimizer's part; None from a peer that refuses."""
        if entry.name not in workers:
            workers[entry.name] = self._worker(entry, "time")
            answer = workers[entry.name].answer()  # after a warm-up step
            if answer != "ready":
                self.records[entry.name]["failed"] = answer["failed"]
                workers.pop(entry.name).end()
                return None
        time.sleep(PAUSE_SECONDS)
        answer = workers[entry.name].ask("step")
        if not keep or isinstance(answer, dict):
            workers.pop(entry.name).end()
        if isinstance(answer, dict):
            self.records[entry.name]["failed"] = answer["failed"]
            return None
        return answer[0], answer[1]
