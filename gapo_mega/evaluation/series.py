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
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    if not lines:
        raise ValueError(
            f"run directory: found no steps in {path}, accepted: a directory that a run has written"
        )
    rows: list[dict[str, Any]] = [json.loads(line) for line in lines]
    keys = {key: None for row in rows for key in row if key != "step"}
    columns = {key: np.array([_number(row.get(key)) for row in rows]) for key in keys}
    return Series(np.array([float(row["step"]) for row in rows]), columns)


def _number(value: float | None) -> float:
    return math.nan if value is None else float(value)
