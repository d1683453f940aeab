"""``metrics.jsonl`` as one array per key, ready to plot."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

Array: TypeAlias = NDArray[np.float64]

METRICS_FILE = "metrics.jsonl"


@dataclass(frozen=True)
class Series:
    """Optimizer steps and, under every metric's key, one value a step (NaN where the log has null)."""

    steps: Array
    values: dict[str, Array]

    def __getitem__(self, key: str) -> Array:
        return self.values[key]

    @property
    def window(self) -> int:
        """Steps that a moving average spans: a tenth of the run, odd."""
        return max(1, len(self.steps) // 10) | 1

    def smooth(self, key: str) -> Array:
        """Centred moving average over ``window`` steps; NaN steps are left out, edges use fewer."""
        values = self.values[key]
        known = np.isfinite(values)
        kernel = np.ones(self.window)
        total = np.convolve(np.where(known, values, 0.0), kernel, mode="full")
        count = np.convolve(known.astype(float), kernel, mode="full")
        half = self.window // 2
        inside = slice(half, half + len(values))
        result: Array = np.divide(
            total[inside], count[inside], out=np.full(len(values), math.nan), where=count[inside] > 0.5
        )
        return result


def read_series(run_dir: Path) -> Series:
    """Every step of the run in ``run_dir``. Raises ``ValueError`` where nothing has been logged."""
    path = run_dir / METRICS_FILE
    rows = read_rows(path)
    if not rows:
        raise ValueError(
            f"run directory: found no steps in {path}, accepted: a directory that a run has written"
        )
    keys = {key: None for row in rows for key in row if key != "step"}
    columns = {key: np.array([_number(row.get(key), key, path, row["step"]) for row in rows]) for key in keys}
    return Series(np.array([float(row["step"]) for row in rows]), columns)


def read_rows(path: Path) -> list[dict[str, Any]]:
    """The JSON object of every line of a log, none where there is no file.

    A last line that was not written to its end, by a run that is writing or was killed, is left out. Raises
    ``ValueError`` for any other line that is no JSON object with a step.
    """
    lines = path.read_bytes().split(b"\n") if path.is_file() else [b""]
    # What follows the last line break is empty, or a line without its end.
    *complete, last = lines
    rows = [_row(line, f"{path}: line {number}") for number, line in enumerate(complete, 1)]
    rest = _parsed(last)
    return rows if rest is None else [*rows, rest]


def is_number(value: object) -> bool:
    """Whether a value of the log is a number; JSON's true and false are none."""
    return isinstance(value, int | float) and not isinstance(value, bool)


def _row(line: bytes, place: str) -> dict[str, Any]:
    """A step's metrics. Raises ``ValueError`` for anything else."""
    row = _parsed(line)
    if row is None:
        found = line.decode("utf-8", "replace").strip()[:60]
        raise ValueError(f"{place}: found {found!r}, accepted: a JSON object with a step")
    return row


def _parsed(line: bytes) -> dict[str, Any] | None:
    """The object in ``line``; None for what is no JSON object with a step."""
    try:
        row = json.loads(line)
    except ValueError:
        return None
    return row if isinstance(row, dict) and is_number(row.get("step")) else None


def _number(value: object, key: str, path: Path, step: float) -> float:
    if value is None:
        return math.nan
    if not is_number(value):
        raise ValueError(f"{path}: step {step}: found {key} {value!r}, accepted: a number or null")
    assert isinstance(value, int | float)
    return float(value)
