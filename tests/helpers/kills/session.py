"""Runs cases side by side, keeps what came of each in a file, and goes on where it was stopped."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import yaml
from tqdm import tqdm

from tests.helpers import forking
from tests.helpers.kills.cases import LAYOUTS, PARALLEL, STARTS, Case, draw
from tests.helpers.kills.judging import STEPS, Standing, after_kill, at_end
from tests.helpers.kills.phases import of_runs
from tests.helpers.kills.running import CONFIG, Attempt, Run
from tests.helpers.kills.state import of_cases, of_code
from tests.helpers.rank_runs import settings

RESULTS = "kills.jsonl"
_SILENCE = 0.5  # minutes: a launcher that is killed takes the ranks' store along


class Session:
    """The folder of a series of cases, its reference runs, and what is known."""

    def __init__(
        self,
        folder: Path,
        seed: int,
        layouts: tuple[str, ...],
        start: str,
        workers: int,
        again: float = 0.25,
    ) -> None:
        """``start``: how commands start, one of ``STARTS``, or "both": every tenth case as a command.

        ``again``: as ``draw`` takes it. Raises ``ValueError`` where ``folder`` has cases of other code.
        """
        self._folder = folder
        self._seed, self._layouts, self._start, self._again = seed, layouts, start, again
        self._workers = workers
        self._results = folder / RESULTS
        self.found: list[dict[str, Any]] = read(self._results)
        self._state = of_code()
        states = of_cases(self.found)
        if states not in ([], [self._state]):
            raise ValueError(
                f"--out: found {self._results}, with cases of the code {', '.join(states)}, accepted: of "
                f"{self._state}, which this is, or none"
            )

    def run(self, kills: int) -> None:
        """Run cases until so many kills are known. Raises ``RuntimeError`` where undisturbed runs fail."""
        if self._count() >= kills:
            return
        forking.load()
        self._prepare()
        running: dict[int, Case] = {}
        try:
            self._run(kills, running)
        finally:
            for process in running:  # they end what they have started
                os.kill(process, signal.SIGTERM)
                forking.wait(process, 30.0)

    def _run(self, kills: int, running: dict[int, Case]) -> None:
        number = 0
        with tqdm(total=kills, initial=min(kills, self._count()), unit="kill", smoothing=0.05) as bar:
            while self._count() < kills or running:
                if len(running) < self._workers and self._count() + len(running) < kills:
                    case = self._case(number)
                    number += 1
                    if not self._known(case):
                        running[forking.in_fork(lambda case=case: self._do(case))] = case
                    continue
                for process in list(running):
                    if forking.reap(process) is not None:
                        self._take(running.pop(process))
                        bar.n = min(kills, self._count())
                        bar.set_postfix(cases=len(self.found), failed=len(self.failed), refresh=True)
                time.sleep(0.05)

    @property
    def failed(self) -> list[dict[str, Any]]:
        return [found for found in self.found if found["faults"]]

    def _count(self) -> int:
        return sum(kill["hit"] is not None for found in self.found for kill in found["kills"])

    def _case(self, number: int) -> Case:
        start = self._start
        if start == "both":
            start = STARTS[number % 10 == 9]
        return draw(self._seed, number, self._layouts, start, self._again)

    def _known(self, case: Case) -> bool:
        return any((found["seed"], found["case"]) == (self._seed, case.number) for found in self.found)

    # -- undisturbed runs ----------------------------------------------------------------------------
    def _prepare(self) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        if not (self._folder / "prompts.jsonl").exists():
            # In a fork: it makes threads.
            from tests.helpers.rank_runs import prepare

            assert forking.wait(forking.in_fork(lambda: prepare(self._folder)), 300.0) == 0
        for layout in self._layouts:
            if not self._counts(layout).exists():
                self._make_reference(layout)

    def _reference(self, layout: str) -> Path:
        return self._folder / f"undisturbed-{layout}"

    def _counts(self, layout: str) -> Path:
        return self._reference(layout) / "counts.json"

    def _make_reference(self, layout: str) -> None:
        run = self._new_run(
            self._reference(layout), layout, "forked" if self._start == "forked" else "command"
        )
        done, counts = run.observe()
        if done.code != 0:
            raise RuntimeError(f"the undisturbed run {layout} ended with {done.code}:\n{done.log[-4000:]}")
        phases = of_runs(LAYOUTS[layout].background)
        missing = [phase.name for phase in phases if phase.name not in counts]
        if missing:  # and so would never be hit
            raise RuntimeError(f"no function of phases.py was called in {layout} for {', '.join(missing)}")
        self._counts(layout).write_text(json.dumps(counts))

    def _new_run(self, folder: Path, layout: str, start: str) -> Run:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        parallel = {"silence_minutes": _SILENCE, **PARALLEL.get(layout, {})}
        found = settings(
            self._folder,
            "",
            STEPS,
            parallel=parallel,
            data={"heldout_prompts": 2},
            logging={"responses": 1},
            checkpoint={"asynchronous": LAYOUTS[layout].background},
        )
        found["output_dir"] = "run"
        (folder / CONFIG).write_text(yaml.safe_dump(found))
        return Run(folder, layout, start, self._folder / "cache")

    # -- cases ---------------------------------------------------------------------------------------
    def _place(self, case: Case) -> Path:
        return self._folder / f"case-{self._seed}-{case.number}"

    def _do(self, case: Case) -> None:
        """In a process of its own."""
        reference = self._reference(case.layout) / "run"
        counts = json.loads(self._counts(case.layout).read_text())
        folder = self._place(case)
        run = self._new_run(folder, case.layout, case.start)
        kills, faults = [], []
        for kill in case.kills:
            before = Standing(run.directory)
            attempt = run.attempt(kill, counts)
            if attempt.hit is None:
                faults += _unhit(attempt, before)
            else:
                faults += after_kill(case, kill, attempt, run.directory, reference)
            kills.append({**asdict(kill), "signal": kill.told, **_told(attempt, Standing(run.directory))})
            if faults:
                break
        resumed = False
        if not faults:
            before = Standing(run.directory)
            last = run.attempt()
            faults += at_end(last, before, run.directory, reference)
            resumed = last.code == 0
        about = {
            "state": self._state,
            "seed": self._seed,
            "case": case.number,
            "layout": case.layout,
            "ranks": LAYOUTS[case.layout].ranks,
            "start": case.start,
            "kills": kills,
            "resumed": resumed,
            "equal": resumed and not faults,
            "faults": faults,
        }
        (folder / "found.json").write_text(json.dumps(about))

    def _take(self, case: Case) -> None:
        """Keep what came of it; of what failed, also its folder."""
        folder = self._place(case)
        path = folder / "found.json"
        if not path.is_file():
            raise RuntimeError(f"{folder}: the case did not end as cases do")
        found = json.loads(path.read_text())
        self.found.append(found)
        with self._results.open("a", encoding="utf-8") as file:
            file.write(json.dumps(found) + "\n")
            file.flush()
            os.fsync(file.fileno())
        if not found["faults"]:
            shutil.rmtree(folder)


def read(path: Path) -> list[dict[str, Any]]:
    """The cases that a file holds; a last line that was cut off is none."""
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]


def _unhit(attempt: Attempt, before: Standing) -> list[str]:
    """A run that never came to the place: it must have ended well."""
    return (
        []
        if attempt.code == 0
        else [f"ended with {attempt.code} before it was disturbed: {attempt.log[-800:]}"]
    )


def _told(attempt: Attempt, standing: Standing) -> dict[str, Any]:
    return {
        "hit": attempt.hit,
        "sent": attempt.sent,
        "code": attempt.code,
        "seconds": round(attempt.seconds, 1),
        "checkpoint": standing.checkpoint,
        "lines": standing.lines,
        "finished": standing.finished,
    }
