"""``results.json`` of a sweep: what every point came to, and the front of all that have ended."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo_mega.config.sweep import SweepConfig
from gapo_mega.evaluation.files import write_text
from gapo_mega.evaluation.finished_run import FinishedRun, known, read_run
from gapo_mega.evaluation.front import Candidate, judge
from gapo_mega.files import local
from gapo_mega.runs.lock import disk_errors
from gapo_mega.runs.sweep_points import POINTS_FOLDER, Point
from gapo_mega.runs.sweep_states import StateName, state_of

RESULTS_FILE = "results.json"
BEFORE_TRAINING = "held-out means before training"
FROM_THE_FILE = "front.reference_point"


def results_file(sweep: SweepConfig) -> Path:
    """Where the results lie."""
    return local(sweep.output_dir) / RESULTS_FILE


def check_front(sweep: SweepConfig, points: Sequence[Point]) -> None:
    """Raise ``ValueError`` for objectives that points lack, and for a reference point that would move."""
    for point in points:
        names = [objective.name for objective in point.config.objectives]
        for name in front_names(sweep, points):
            if name not in names:
                raise ValueError(
                    f"front.objectives: found {name}, which point {point.index} ({point.name}) has not; "
                    f"accepted: {', '.join(names)}"
                )
        if point.config.data.heldout_prompts == 0:
            raise ValueError(
                f"data.heldout_prompts: found 0 in point {point.index} ({point.name}), accepted: more (they "
                "are what points are compared by)"
            )
    given, names = sweep.front.reference_point, front_names(sweep, points)
    if given is not None and set(given) != set(names):
        raise ValueError(
            f"front.reference_point: found {', '.join(given)}, accepted: one number for each of "
            f"{', '.join(names)}"
        )
    frozen = _frozen(sweep)
    if given is not None and frozen is not None and any(frozen["values"].get(n) != given[n] for n in names):
        raise ValueError(
            f"front.reference_point: found {given}, but {results_file(sweep)} has {frozen['values']}, which "
            "stays; accepted: that one, or another output_dir"
        )


def front_names(sweep: SweepConfig, points: Sequence[Point]) -> list[str]:
    """The objectives that span the front."""
    return sweep.front.objectives or [objective.name for objective in points[0].config.objectives]


def write_results(
    sweep: SweepConfig, points: Sequence[Point], states: Mapping[str, StateName], *, final: bool
) -> dict[str, Any]:
    """Write the results as they are now, and return them.

    The reference point is fixed once every seed has a point that has ended, or with ``final``, and never
    moves again.
    """
    runs = {point.name: read_run(point.directory) for point in points if states[point.name] == "finished"}
    names = front_names(sweep, points)
    reference = _frozen(sweep) or _reference(sweep, points, runs, names, final)
    document: dict[str, Any] = {
        "objectives": names,
        "reference_point": reference,
        "hypervolume": None,
        "points": [_point(point, states[point.name], runs.get(point.name)) for point in points],
        "front": None,
    }
    candidates = _candidates(points, runs, names)
    if candidates:
        origin = None if reference is None else [float(reference["values"][name]) for name in names]
        front = judge(candidates, names, origin)
        document |= {"hypervolume": front["hypervolume"], "front": front}
    with disk_errors(local(sweep.output_dir)):
        write_text(results_file(sweep), json.dumps(document, indent=1, allow_nan=False) + "\n")
    return document


def _point(point: Point, state: StateName, run: FinishedRun | None) -> dict[str, Any]:
    found: dict[str, Any] = {
        "point": point.index,
        "name": point.name,
        "directory": str(point.directory),
        "method": point.method,
        "preference": None if point.preference is None else list(point.preference),
        "seed": point.seed,
        "settings": json.loads(json.dumps(dict(point.settings), default=str)),
        "state": state,
    }
    return found if run is None else found | run.as_dict()


def _candidates(
    points: Sequence[Point], runs: Mapping[str, FinishedRun], names: Sequence[str]
) -> list[Candidate]:
    groups: dict[str, list[Point]] = {}
    for point in points:
        if point.name in runs and all(map(math.isfinite, runs[point.name].after(names))):
            groups.setdefault(point.group, []).append(point)
    found = []
    for name, members in groups.items():
        errors = None
        if len(members) == 1:
            errors = tuple(runs[members[0].name].summary[n].standard_error for n in names)
        by_seed = {point.seed: runs[point.name].after(names) for point in members}
        found.append(Candidate(name, members[0].method, by_seed, errors))
    return found


def _reference(
    sweep: SweepConfig,
    points: Sequence[Point],
    runs: Mapping[str, FinishedRun],
    names: Sequence[str],
    final: bool,
) -> dict[str, Any] | None:
    given = sweep.front.reference_point
    if given is not None:
        return {"values": {name: given[name] for name in names}, "from": FROM_THE_FILE}
    by_seed: dict[int, FinishedRun] = {}
    for point in points:
        if point.name in runs:
            by_seed.setdefault(point.seed, runs[point.name])
    if not by_seed or (not final and set(by_seed) != {point.seed for point in points}):
        return None
    all_names = list(next(iter(by_seed.values())).summary)
    values = {
        name: known(float(np.mean([run.summary[name].before for run in by_seed.values()])))
        for name in all_names
    }
    if any(values[name] is None for name in names):
        return None
    return {"values": values, "from": f"{BEFORE_TRAINING}, seeds {', '.join(map(str, sorted(by_seed)))}"}


def _frozen(sweep: SweepConfig) -> dict[str, Any] | None:
    """The reference point that earlier results have fixed."""
    path = results_file(sweep)
    if not path.is_file():
        return None
    try:
        found = json.loads(path.read_text(encoding="utf-8"))["reference_point"]
        numbers = (
            None
            if found is None
            else [float(value) for value in found["values"].values() if value is not None]
        )
    except (ValueError, KeyError, TypeError):
        raise ValueError(
            f"output_dir: found {path}, which no sweep has written so; accepted: another output_dir, or to "
            "move that file"
        ) from None
    return dict(found) if numbers else None


def point_directories(directories: Sequence[Path]) -> tuple[list[Path], list[Path]]:
    """Directories of runs, for a sweep those of its points; and of points that have not ended."""
    ended: list[Path] = []
    others: list[Path] = []
    for directory in directories:
        if not (directory / POINTS_FOLDER).is_dir():
            ended.append(directory)  # who reads it says what is missing
            continue
        for point in sorted(path for path in (directory / POINTS_FOLDER).iterdir() if path.is_dir()):
            (ended if state_of(point, None).name == "finished" else others).append(point)
    if not ended:
        raise ValueError(
            f"run directory: found {len(others)} points in {', '.join(map(str, directories))}, of which none "
            "has ended; accepted: runs that have"
        )
    return ended, others
