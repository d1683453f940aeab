"""What must hold of a run's directory after a kill, and after the run has gone on to its end."""

from __future__ import annotations

import json
import re
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import FileSystemReader
from torch.distributed.checkpoint.default_planner import _EmptyStateDictLoadPlanner
from torch.distributed.checkpoint.state_dict_loader import _load_state_dict

from tests.helpers.kills.cases import LAYOUTS, Case, Kill
from tests.helpers.kills.running import Attempt
from tests.helpers.metrics_log import VARYING, metrics

STEPS = 3
STOPPED, SECOND_CTRL_C, PEERS_LOST = 75, 130, 76  # of docs/operations.md
_BEFORE_STEPS = ("start", "resuming", "before training")  # of whereabouts
_STOPPED_AFTER = re.compile(r"stopped by a signal after step (\d+)")
_WHOLE = ("hf", "heldout_answers.jsonl")  # the same bytes in every run, once they are there


class Standing:
    """How far a run has come, by what is in its directory."""

    def __init__(self, run: Path) -> None:
        markers = [
            json.loads(path.read_text()) for path in sorted(run.glob("checkpoints/step_*/complete.json"))
        ]
        self.checkpoint = max((marker["step"] for marker in markers), default=0)
        log = run / "metrics.jsonl"
        text = log.read_text() if log.is_file() else ""
        self.lines = text.count("\n")
        manifest = run / ".gapo-mega.json"
        self.finished = manifest.is_file() and json.loads(manifest.read_text())["finished"] == STEPS


def after_kill(case: Case, kill: Kill, attempt: Attempt, run: Path, reference: Path) -> Iterator[str]:
    """What is wrong after an attempt that was disturbed."""
    standing = Standing(run)
    yield from _processes(attempt)
    accepted = _codes(case, kill, attempt, standing)
    if attempt.code not in accepted:
        yield f"exit code {attempt.code}, accepted: {sorted(accepted)}"
    if attempt.code == STOPPED:
        said = _STOPPED_AFTER.findall(attempt.log)
        if said != [str(standing.checkpoint)]:
            yield f"stopped after step {said}, and the newest checkpoint is that of {standing.checkpoint}"
    if attempt.code == 0 and not standing.finished:
        yield "exit code 0, and the run is not at its end"
    # In the background, step n + 1 trains while the checkpoint of step n is being written.
    without = 2 if LAYOUTS[case.layout].background else 1
    if standing.lines > standing.checkpoint + without:
        yield f"{standing.lines} steps are in the log, the newest checkpoint is that of {standing.checkpoint}"
    yield from _damaged(run)
    yield from _halves(run, reference)


def at_end(attempt: Attempt, before: Standing, run: Path, reference: Path) -> Iterator[str]:
    """What is wrong after the attempt that nothing disturbed."""
    yield from _processes(attempt)
    if attempt.code != 0:
        yield f"resuming: exit code {attempt.code}"
        return
    resumed = [int(step) for step in re.findall(r"resumed from \S*step_(\d+)", attempt.log)]
    if resumed != ([before.checkpoint] if before.checkpoint else []):
        yield f"resumed from {resumed}, and the newest checkpoint was that of {before.checkpoint}"
    if metrics(run) != metrics(reference):
        yield "metrics.jsonl differs"
    cut = {path.name for path in run.glob("metrics.cut-*.jsonl")}  # what steps that are done again had logged
    there, wanted = files(run) - cut, files(reference)
    if there != wanted:
        yield f"files: {sorted(there - wanted)} too many, {sorted(wanted - there)} missing"
    yield from _damaged(run)
    yield from _halves(run, reference)
    for step in _steps(reference):
        yield from _other_state(run / step, reference / step)
    if _summary(run) != _summary(reference):
        yield "summary.json differs"


def _codes(case: Case, kill: Kill, attempt: Attempt, standing: Standing) -> set[int]:
    """What the command may end with, by the first signal, or by the second."""
    accepted = _codes_by_first(case, kill, attempt, standing)
    over = standing.finished or _STOPPED_AFTER.search(attempt.log)
    if over and kill.again is not None and not LAYOUTS[case.layout].nproc:
        # Python's last act is to restore what signals do by default. For Ctrl-C, shells say 130.
        accepted.add(-int(kill.number))
    return accepted


def _codes_by_first(case: Case, kill: Kill, attempt: Attempt, standing: Standing) -> set[int]:
    hit_itself = kill.target in ("launcher", "all") or not LAYOUTS[case.layout].nproc
    if kill.signal == "SIGKILL" and hit_itself:
        return {-9}
    if LAYOUTS[case.layout].nproc:
        # 1 where its processes have ended in different ways, or by signals alone.
        accepted = {0, 1, PEERS_LOST} if standing.finished else {1, PEERS_LOST}
        if kill.signal == "SIGKILL":
            return accepted
        return accepted | ({STOPPED, SECOND_CTRL_C} if kill.signal == "SIGINT" else {STOPPED})
    begun = attempt.hit is None or attempt.hit["place"] not in _BEFORE_STEPS
    # Nothing is to be lost there: signals end a process as they end any command.
    ended_by_it = 130 if kill.signal == "SIGINT" else -int(kill.number)
    if standing.finished:
        return {0} if begun else {0, ended_by_it}  # nothing was left to stop
    if not begun:
        return {ended_by_it}
    return {STOPPED, SECOND_CTRL_C} if kill.signal == "SIGINT" and kill.again is not None else {STOPPED}


def _processes(attempt: Attempt) -> Iterator[str]:
    if attempt.code is None:
        yield "the command did not end"
    for process in attempt.left or []:
        yield f"did not end: {process}"


def files(run: Path) -> set[str]:
    return {str(path.relative_to(run)) for path in run.rglob("*") if not path.is_dir()}


def _damaged(run: Path) -> Iterator[str]:
    """Checkpoints are what ``complete.json`` says, by checksums of our own."""
    for checkpoint in sorted(run.glob("checkpoints/step_*")):
        marker = checkpoint / "complete.json"
        if not marker.is_file():
            yield f"{checkpoint.name} has the name of a checkpoint and is none"
            continue
        for name, entry in json.loads(marker.read_text())["files"].items():
            data = (checkpoint / name).read_bytes() if (checkpoint / name).is_file() else b""
            if [len(data), zlib.crc32(data)] != [entry["bytes"], int(entry["crc32"], 16)]:
                yield f"{checkpoint.name}/{name} is not what was written"


def _halves(run: Path, reference: Path) -> Iterator[str]:
    """What is there under its name is whole."""
    for name in _WHOLE:
        for path in sorted(files_below(reference / name)) if (run / name).exists() else []:
            mine = run / path.relative_to(reference)
            if not mine.is_file() or mine.read_bytes() != path.read_bytes():
                yield f"{mine.relative_to(run)} differs"
    page = run / "report" / "index.html"
    if page.is_file() and not page.read_text().rstrip().endswith("</html>"):
        yield "report/index.html is cut off"
    log = run / "metrics.jsonl"
    if log.is_file():
        whole = [line for line in log.read_text().splitlines(keepends=True) if line.endswith("\n")]
        mine_read = [_without_times(json.loads(line)) for line in whole]
        if mine_read != metrics(reference)[: len(mine_read)]:
            yield "the lines of metrics.jsonl are not those of the undisturbed run"


def files_below(path: Path) -> list[Path]:
    return [path] if path.is_file() else [inner for inner in path.rglob("*") if inner.is_file()]


def _steps(run: Path) -> list[str]:
    return sorted(str(path.relative_to(run)) for path in run.glob("checkpoints/step_*"))


def _other_state(mine: Path, other: Path) -> Iterator[str]:
    """Parameters, moments of the optimizer, and where the random numbers are: the same bits."""
    found, wanted = _state(mine), _state(other)
    if found.keys() != wanted.keys():
        yield f"{mine.name} holds other entries"
    for name in sorted(found.keys() & wanted.keys()):
        if not torch.equal(found[name], wanted[name]):
            yield f"{mine.name}: {name} differs"


def _state(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint, read by torch alone."""
    state: dict[str, Any] = {}
    _load_state_dict(
        state,
        storage_reader=FileSystemReader(checkpoint),
        planner=_EmptyStateDictLoadPlanner(),
        no_dist=True,
    )
    return dict(_tensors("", state))


def _tensors(name: str, value: object) -> Iterator[tuple[str, torch.Tensor]]:
    if isinstance(value, torch.Tensor):
        yield name, value
    elif isinstance(value, dict):
        for key, inner in value.items():
            yield from _tensors(f"{name}.{key}", inner)


def _without_times(line: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in line.items() if not key.startswith(VARYING)}


def _summary(run: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((run / "summary.json").read_text())
    return {key: value for key, value in found.items() if key != "seconds"}
