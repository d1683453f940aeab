"""The results of all cells in one file, and the tables that docs/testbed.md shows."""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.testbed.cells import TUNING_SEEDS
from benchmarks.testbed.methods import GDPO, METHODS, WEIGHTED_SUM
from benchmarks.testbed.regimes import REGIMES
from benchmarks.testbed.store import COMPUTE, FRONT, LISTS, Store

# A difference of so many standard errors is marked in the tables.
_MARKED = 3.0

Result = dict[str, Any]
Cells = dict[tuple[str, str], dict[str, Any]]  # by regime and method
Value = Callable[[dict[str, Any]], str | None]
# Title, results, what a field shows of one, a first row by regime.
_Table = tuple[str, Cells, Value, dict[str, str] | None]


@dataclass(frozen=True)
class Estimate:
    """A mean over seeds and its standard error."""

    mean: float
    error: float

    @classmethod
    def of(cls, values: Sequence[float]) -> Estimate:
        """The standard error is that of independent seeds, n - 1 in the variance."""
        numbers = np.asarray(values, dtype=np.float64)
        return cls(float(numbers.mean()), float(numbers.std(ddof=1) / np.sqrt(len(numbers))))

    def __str__(self) -> str:
        return f"{_short(self.mean)} ±{_short(self.error)}"


def collected(store: Store) -> Result:
    """All finished results, in the order of the tables, with the numbers of every seed."""
    found: dict[str, list[dict[str, Any]]] = {"": [], COMPUTE: [], FRONT: []}
    for regime, method in itertools.product(REGIMES, METHODS):
        for kind, results in found.items():
            result = store.finished(regime, method, kind)
            if result is not None:
                results.append({key: value for key, value in result.items() if key != "tried"})
    return {
        "plan": {**asdict(store.plan), "tuning_seeds": list(TUNING_SEEDS)},
        "regimes": {name: regime.label for name, regime in REGIMES.items()},
        **{LISTS[kind]: results for kind, results in found.items()},
    }


def write_results(result: Result, path: Path) -> Path:
    """As JSON, a cell a line."""
    parts = []
    for key, value in result.items():
        lines = value if isinstance(value, list) else [value]
        body = ",\n".join(json.dumps(line) for line in lines)
        parts.append(f"{json.dumps(key)}: " + (f"[\n{body}\n]" if isinstance(value, list) else body))
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{\n" + ",\n".join(parts) + "\n}\n", encoding="utf-8")
    return path


def write_tables(result: Result, path: Path) -> Path:
    """As Markdown."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(document(result), encoding="utf-8")
    return path


def document(result: Result) -> str:
    """Every table below one heading."""
    return "\n\n".join(["# All tables of the exact test bed", *tables(result)]) + "\n"


def tables(result: Result) -> list[str]:
    """Every table, with its heading."""
    cells, compute, fronts = (
        {(one["regime"], one["method"]): one for one in result[key]} for key in LISTS.values()
    )
    possible = {one["regime"]: str(Estimate.of(one["possible"])) for one in result["cells"]}

    def measure(name: str) -> Value:
        return lambda cell: str(Estimate.of(cell[name]))

    def against(other: str) -> Value:
        return lambda cell: _difference(cell, cells.get((cell["regime"], other)))

    worst = "Gain of the worst objective"
    made: list[_Table] = [
        (f"{worst}, equal steps", cells, measure("worst"), possible),
        (f"{worst}, equal compute", compute, measure("worst"), possible),
        ("Mean gain", cells, measure("mean"), None),
        (
            "Hypervolume of the front over preferences, over the true front's",
            fronts,
            measure("hypervolume"),
            None,
        ),
        ("Distance to the front", cells, measure("distance"), None),
        ("Share of steps under which an objective falls, mean over objectives", cells, measure("hurt"), None),
        ("Share of steps under which some objective falls", cells, measure("hurt_any"), None),
        ("KL from the start", cells, measure("kl"), None),
        (f"{worst} beyond the weighted sum's, same seeds", cells, against(WEIGHTED_SUM), None),
        (f"{worst} beyond GDPO's, same seeds", cells, against(GDPO), None),
        ("What tuning chose: learning rate, factor of the KL, options", cells, _chosen, None),
    ]
    found = [
        ("Share of the possible worst gain, equal steps, best mean first", _shares(result)),
        *((one[0], _table(result["regimes"], *one[1:])) for one in made),
    ]
    return [f"## {title}\n\n{table}" for title, table in found if table]


def _table(
    regimes: dict[str, str],
    cells: Cells,
    value: Value,
    possible: dict[str, str] | None,
) -> str:
    """Rows of methods, columns of regimes; empty where no cell has the number."""
    shown = {key: text for key, cell in cells.items() if (text := value(cell)) is not None}
    columns = [name for name in regimes if any(regime == name for regime, _ in shown)]
    rows = [name for name in METHODS if any(method == name for _, method in shown)]
    if not rows:
        return ""
    lines = [["", *(regimes[name] for name in columns)], ["---"] * (len(columns) + 1)]
    if possible is not None:
        lines.append(["possible", *(possible[name] for name in columns)])
    lines += [[METHODS[row].label, *(shown.get((name, row), "") for name in columns)] for row in rows]
    return _markdown(lines)


def _shares(result: Result) -> str:
    """A row for every method with all regimes: the mean over them of its worst gain over the possible one.

    The errors of the regimes are taken as independent, that of the possible gain is left out.
    """
    shares: dict[str, list[tuple[float, float, str]]] = {}
    for cell in result["cells"]:
        possible, worst = Estimate.of(cell["possible"]).mean, Estimate.of(cell["worst"])
        found = worst.mean / possible, worst.error / possible, result["regimes"][cell["regime"]]
        shares.setdefault(cell["method"], []).append(found)
    whole = {name: found for name, found in shares.items() if len(found) == len(result["regimes"])}
    if not whole:
        return ""
    lines = [["", "mean over regimes", "smallest", "regime of the smallest"], ["---"] * 4]
    for name, found in sorted(whole.items(), key=lambda item: -sum(one[0] for one in item[1])):
        mean = Estimate(
            float(np.mean([one[0] for one in found])),
            float(np.sqrt(np.sum([one[1] ** 2 for one in found])) / len(found)),
        )
        share, error, regime = min(found)
        lines.append([METHODS[name].label, str(mean), str(Estimate(share, error)), regime])
    return _markdown(lines)


def _markdown(lines: Sequence[Sequence[str]]) -> str:
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _difference(cell: dict[str, Any], other: dict[str, Any] | None) -> str | None:
    """By seed, which both have in common; marked where it is many standard errors."""
    if other is None or other is cell:
        return None
    found = Estimate.of(np.subtract(cell["worst"], other["worst"]).tolist())
    return f"**{found}**" if abs(found.mean) > _MARKED * found.error else str(found)


def _chosen(cell: dict[str, Any]) -> str:
    tuned = cell["tuned"]
    options = [f"{key} {value:g}" for key, value in tuned["options"].items()]
    kl = [] if len(METHODS[cell["method"]].kl_factors) == 1 else [f"KL {tuned['kl']:g}"]
    return ", ".join([f"{tuned['rate']:g}", *kl, *options])


def _short(number: float) -> str:
    """Three decimals without a leading zero: .305, -.014, 1.200."""
    text = f"{number:.3f}"
    if text in ("0.000", "-0.000"):
        return ".000"
    return text.replace("0.", ".", 1) if abs(number) < 1 else text
