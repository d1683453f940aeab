"""Gains of sweeps' points in one unit, and what methods have of them."""

from __future__ import annotations

import gzip
import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RESULTS = "results.json"  # of a sweep
METRICS = "metrics.jsonl"  # of a run
_CHANGE = "actual_change/"
ANSWERS = "heldout_answers.jsonl"  # of a run
JUDGED = "judged_answers.jsonl"  # the same with scores of models that no run was trained on


@dataclass(frozen=True)
class Point:
    """A run that has ended.

    Attributes:
        gains: by objective, held-out mean after training less before; in units of the scores' spread before.
        errors: by objective, the gain's standard error over the held-out prompts, in the same units.
        hurt_steps: share of the steps looked at under which an objective fell to first order, by the
            change that the optimizer made; None: none was looked at.
    """

    group: str
    seed: int
    gains: Mapping[str, float]
    errors: Mapping[str, float]
    kl: float
    length: float
    hurt_steps: float | None = None

    @property
    def worst(self) -> float:
        return min(self.gains.values())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gains.values())


def ended_runs(folders: Sequence[Path]) -> list[tuple[str, Mapping[str, Any], Path]]:
    """Group, result and directory of every ended point of the sweeps in ``folders``.

    Raises ``ValueError`` for a folder without results, and where no point has ended.
    """
    ended: list[tuple[str, Mapping[str, Any], Path]] = []
    for folder in folders:
        file = folder / RESULTS
        if not file.is_file():
            raise ValueError(f"{folder}: found no {RESULTS}, accepted: output directories of gapo-mega sweep")
        for point in json.loads(file.read_text(encoding="utf-8"))["points"]:
            if point["state"] == "finished":
                ended.append((_group(folder.name, point), point, folder / "points" / str(point["name"])))
    if not ended:
        raise ValueError(f"{', '.join(map(str, folders))}: found no point that has ended")
    return ended


def _group(sweep: str, point: Mapping[str, Any]) -> str:
    """What the points of a method have in common, as a table shows it."""
    preference = "" if point["preference"] is None else f" {point['preference']}"
    settings = "".join(f", {name.split('.')[-1]} {value}" for name, value in point["settings"].items())
    return f"{sweep}: {point['method']}{preference}{settings}"


def rows_of(file: Path) -> list[dict[str, Any]]:
    """The lines of a file of a run, or of its packed copy in what ``keep`` has written."""
    data = file.read_bytes() if file.is_file() else gzip.decompress(packed_name(file).read_bytes())
    # Not splitlines: texts may hold other characters at which that would split.
    return [json.loads(line) for line in data.decode("utf-8").split("\n") if line]


def is_there(file: Path) -> bool:
    """Whether a file of a run is there, packed or not."""
    return file.is_file() or packed_name(file).is_file()


def packed_name(file: Path) -> Path:
    """Where ``keep`` puts the lines of ``file``."""
    return file.with_name(f"{file.name}.gz")


def read(folders: Sequence[Path], answers: str = ANSWERS) -> list[Point]:
    """The ended points of all sweeps in ``folders``, by their files ``answers``.

    The spread is that of the scores of all their runs' held-out answers before training. Raises
    ``ValueError`` as ``ended_runs``, for a run without that file, sweeps of other objectives, and an
    objective of one score.
    """
    ended = ended_runs(folders)
    missing = [run for *_, run in ended if not is_there(run / answers)]
    if missing:
        raise ValueError(f"{missing[0]}: found no {answers}, accepted: runs that have it")
    rows = [rows_of(run / answers) for *_, run in ended]
    before = [row["before"]["scores"] for one in rows for row in one]
    names = list(before[0])
    if any(list(scores) != names for scores in before):
        raise ValueError(
            f"{', '.join(map(str, folders))}: found other objectives, accepted: sweeps of one base"
        )
    spread = {name: statistics.pstdev(scores[name] for scores in before) for name in names}
    constant = [name for name in names if spread[name] == 0]
    if constant:
        raise ValueError(f"objective {constant[0]!r}: found one score everywhere before training: no unit")
    measured = [{name: _gain(own, name) for name in names} for own in rows]
    return [
        Point(
            group,
            int(point["seed"]),
            {name: gain / spread[name] for name, (gain, _) in found.items()},
            {name: error / spread[name] for name, (_, error) in found.items()},
            float(point["kl"]),
            float(point["response_length"]),
            _hurt_steps(rows_of(run / METRICS)),
        )
        for (group, point, run), found in zip(ended, measured, strict=True)
    ]


def _gain(rows: Sequence[Mapping[str, Any]], name: str) -> tuple[float, float]:
    """The mean over prompts, and its standard error: answers to one prompt are alike."""
    by_prompt: dict[str, list[float]] = {}
    for row in rows:
        gain = row["after"]["scores"][name] - row["before"]["scores"][name]
        by_prompt.setdefault(row["prompt"], []).append(gain)
    means = [statistics.fmean(found) for found in by_prompt.values()]
    return statistics.fmean(means), error_of(means)


def _hurt_steps(lines: Sequence[Mapping[str, Any]]) -> float | None:
    """Of a run's log; a scalarizer's own gradient is no objective."""
    changes = [
        [
            value
            for key, value in line.items()
            if key.startswith(_CHANGE) and f"reward/{key.removeprefix(_CHANGE)}" in line
        ]
        for line in lines
    ]
    seen = [min(values) < 0 for values in changes if values]
    return sum(seen) / len(seen) if seen else None


def by_group(points: Sequence[Point]) -> list[tuple[str, list[Point]]]:
    """Points of a method together, the best mean of the worst gain first."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    return sorted(groups.items(), key=lambda item: -statistics.fmean(point.worst for point in item[1]))


def error_of(values: Sequence[float]) -> float:
    """The standard error of the mean, 0 for a single value."""
    return statistics.stdev(values) / len(values) ** 0.5 if len(values) > 1 else 0.0


def table(points: Sequence[Point]) -> str:
    """Markdown, a line a method, the best worst gain first: means over seeds, ± their standard error.

    The line below the table says how well one run's gains are known.
    """
    names = list(points[0].gains)
    heads = ["method", "seeds", "worst gain", "mean gain", *names, "hurt", "hurt steps", "KL", "tokens"]
    lines = [heads, ["---"] * len(heads)]
    for group, found in by_group(points):
        hurt = sum(gain < 0 for point in found for gain in point.gains.values())
        lines.append(
            [
                group,
                str(len(found)),
                _mean([point.worst for point in found]),
                _mean([point.mean for point in found]),
                *(_mean([point.gains[name] for point in found]) for name in names),
                f"{hurt} of {len(found) * len(names)}",
                _mean([point.hurt_steps for point in found if point.hurt_steps is not None]),
                f"{statistics.fmean(point.kl for point in found):.2f}",
                f"{statistics.fmean(point.length for point in found):.1f}",
            ]
        )
    known = ", ".join(f"{name} {statistics.fmean(p.errors[name] for p in points):.2f}" for name in names)
    rows = "".join(f"| {' | '.join(line)} |\n" for line in lines)
    return f"{rows}\nStandard error of one run's gain over its held-out prompts, mean of all runs: {known}.\n"


def _mean(values: Sequence[float]) -> str:
    if not values:
        return ""
    mean = f"{statistics.fmean(values):.2f}"
    return mean if len(values) < 2 else f"{mean} ±{error_of(values):.2f}"
