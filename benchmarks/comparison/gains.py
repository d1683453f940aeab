"""Gains of sweeps' points in one unit, and what methods have of them."""

from __future__ import annotations

import json
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

RESULTS = "results.json"  # of a sweep
ANSWERS = "heldout_answers.jsonl"  # of a run


@dataclass(frozen=True)
class Point:
    """A run that has ended.

    Attributes:
        gains: by objective, held-out mean after training less before; in units of the scores' spread before.
    """

    group: str
    seed: int
    gains: Mapping[str, float]
    kl: float
    length: float

    @property
    def worst(self) -> float:
        return min(self.gains.values())

    @property
    def mean(self) -> float:
        return statistics.fmean(self.gains.values())


def read(folders: Sequence[Path]) -> list[Point]:
    """The ended points of all sweeps in ``folders``.

    The spread is that of the scores of all their runs' held-out answers before training, one answer a prompt.
    Raises ``ValueError`` for a folder without results, sweeps of other objectives, an objective of one score,
    and where no point has ended.
    """
    ended: list[tuple[str, dict[str, object], Path]] = []
    for folder in folders:
        file = folder / RESULTS
        if not file.is_file():
            raise ValueError(f"{folder}: found no {RESULTS}, accepted: output directories of gapo-mega sweep")
        for point in json.loads(file.read_text(encoding="utf-8"))["points"]:
            if point["state"] == "finished":
                group = f"{folder.name}: {str(point['name']).rsplit('-seed', 1)[0]}"
                ended.append((group, point, folder / "points" / str(point["name"])))
    if not ended:
        raise ValueError(f"{', '.join(map(str, folders))}: found no point that has ended")
    before = [json.loads(line)["before"]["scores"] for *_, run in ended for line in _lines(run / ANSWERS)]
    names = list(before[0])
    if any(list(scores) != names for scores in before):
        raise ValueError(
            f"{', '.join(map(str, folders))}: found other objectives, accepted: sweeps of one base"
        )
    spread = {name: statistics.pstdev(scores[name] for scores in before) for name in names}
    constant = [name for name in names if spread[name] == 0]
    if constant:
        raise ValueError(f"objective {constant[0]!r}: found one score everywhere before training: no unit")
    return [_point(group, point, spread) for group, point, _ in ended]


def _lines(file: Path) -> list[str]:
    return [line for line in file.read_text(encoding="utf-8").splitlines() if line]


def _point(group: str, point: Mapping[str, object], spread: Mapping[str, float]) -> Point:
    heldout = point["heldout"]
    assert isinstance(heldout, dict), "results.json is written by gapo-mega sweep"
    gains = {name: heldout[name]["gain"] / unit for name, unit in spread.items()}
    return Point(
        group, int(str(point["seed"])), gains, float(str(point["kl"])), float(str(point["response_length"]))
    )


def table(points: Sequence[Point]) -> str:
    """Markdown, a line a method, the best worst gain first: means over seeds, ± their standard error."""
    groups: dict[str, list[Point]] = {}
    for point in points:
        groups.setdefault(point.group, []).append(point)
    names = list(points[0].gains)
    heads = ["method", "seeds", "worst gain", "mean gain", *names, "hurt", "KL", "tokens"]
    lines = [heads, ["---"] * len(heads)]
    for group, found in sorted(groups.items(), key=lambda item: -statistics.fmean(p.worst for p in item[1])):
        hurt = sum(gain < 0 for point in found for gain in point.gains.values())
        lines.append(
            [
                group,
                str(len(found)),
                _mean([point.worst for point in found]),
                _mean([point.mean for point in found]),
                *(_mean([point.gains[name] for point in found]) for name in names),
                f"{hurt} of {len(found) * len(names)}",
                f"{statistics.fmean(point.kl for point in found):.2f}",
                f"{statistics.fmean(point.length for point in found):.1f}",
            ]
        )
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def _mean(values: Sequence[float]) -> str:
    mean = f"{statistics.fmean(values):.2f}"
    if len(values) < 2:
        return mean
    return f"{mean} ±{statistics.stdev(values) / len(values) ** 0.5:.2f}"
