"""The picture of a comparison: every method's worst gain with its error, and its gain of every objective."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from pathlib import Path

from matplotlib.figure import Figure

from benchmarks.comparison.gains import Point, by_group, error_of

# Colours and marks that all eyes tell apart (Okabe and Ito).
_OBJECTIVES = [("#0072B2", "o"), ("#E69F00", "^"), ("#009E73", "s"), ("#CC79A7", "D"), ("#56B4E9", "v")]
_INK, _MUTED, _FAINT = "#1f2933", "#64707d", "#e4e8ec"


def draw(points: Sequence[Point], path: Path) -> Path:
    """A line a method, the best worst gain on top; bars are one standard error over seeds."""
    groups = by_group(points)[::-1]
    names = list(points[0].gains)
    assert len(names) <= len(_OBJECTIVES), "more objectives than marks"
    figure = Figure(figsize=(8.4, 1.2 + 0.36 * len(groups)), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.axvline(0, color=_MUTED, linewidth=1)
    for row, (_, found) in enumerate(groups):
        for name, (colour, mark) in zip(names, _OBJECTIVES, strict=False):
            gain = statistics.fmean(point.gains[name] for point in found)
            label = name if row == 0 else None
            axes.plot(gain, row, mark, color=colour, markersize=5, alpha=0.75, label=label, zorder=2)
        worst = [point.worst for point in found]
        label = "worst, mean of seeds" if row == 0 else None
        axes.errorbar(
            statistics.fmean(worst), row, xerr=error_of(worst), fmt="|", color=_INK, markersize=14,
            elinewidth=2, label=label, zorder=3,
        )  # fmt: skip
    axes.set_yticks(range(len(groups)), [_label(group) for group, _ in groups], color=_INK)
    axes.set_xlabel("gain, in spreads of the scores before training", color=_MUTED)
    axes.grid(axis="x", color=_FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.tick_params(axis="y", length=0)
    figure.legend(frameon=False, loc="outside upper center", ncols=len(names) + 1, fontsize=9)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _label(group: str) -> str:
    """The method, and the sweep's own part of its name: ``kinds-averaged: gapo`` is gapo (averaged)."""
    sweep, _, method = group.partition(": ")
    kind = sweep.partition("-")[2]
    return f"{method} ({kind})" if kind else method
