"""Fronts of two objectives, as in Figure 3 of the paper: a point a setting, a line a method."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from gapo_mega.evaluation.colours import INK, MUTED, colour
from gapo_mega.evaluation.files import replacing
from gapo_mega.evaluation.front import nondominated
from gapo_mega.evaluation.plot_parts import put_title
from gapo_mega.evaluation.plots import STYLE

_MARKERS = "osD^vPX*<>"


@dataclass(frozen=True)
class Spot:
    """One setting: a mean and a standard error (NaN: unknown) for every objective."""

    method: str
    mean: tuple[float, ...]
    error: tuple[float, ...]
    note: str = ""  # written beside it: its preference, say


def write_fronts(
    directory: Path, names: Sequence[str], spots: Sequence[Spot], start: Sequence[float] | None
) -> list[Path]:
    """``front-A-B.png`` for every two objectives. ``start``: the scores before training, where known."""
    written = []
    for i, j in combinations(range(len(names)), 2):
        figure = Figure(figsize=(6.4, 5.0), layout="constrained")
        with style.context(STYLE):
            _draw(figure, (names[i], names[j]), spots, (i, j), start)
            safe = [re.sub(r"[^A-Za-z0-9._-]", "_", names[k]) for k in (i, j)]
            path = directory / f"front-{safe[0]}-{safe[1]}.png"
            with replacing(path) as partial:
                figure.savefig(partial)
        written.append(path)
    return written


def _draw(
    figure: Figure,
    names: tuple[str, str],
    spots: Sequence[Spot],
    pair: tuple[int, int],
    start: Sequence[float] | None,
) -> None:
    axes = figure.add_subplot()
    for index, method in enumerate(dict.fromkeys(spot.method for spot in spots)):
        own = [spot for spot in spots if spot.method == method]
        points = np.array([[spot.mean[k] for k in pair] for spot in own])
        errors = np.array([[spot.error[k] for k in pair] for spot in own])
        shade = colour(index)
        axes.errorbar(
            points[:, 0],
            points[:, 1],
            xerr=np.nan_to_num(errors[:, 0]),
            yerr=np.nan_to_num(errors[:, 1]),
            fmt=_MARKERS[index % len(_MARKERS)],
            color=shade,
            ecolor=shade,
            elinewidth=0.8,
            markersize=6,
            label=method,
        )
        _line(axes, points, shade)
        for spot, (x, y) in zip(own, points, strict=True):
            axes.annotate(
                spot.note, (x, y), xytext=(5, 5), textcoords="offset points", fontsize=7, color=MUTED
            )
    if start is not None:
        axes.plot(*(start[k] for k in pair), "+", color=INK, markersize=10, label="before training")
    axes.set_xlabel(names[0])
    axes.set_ylabel(names[1])
    axes.legend(loc="best", fontsize=9)
    put_title(
        figure, "Held-out rewards", "bars: standard errors over seeds; lines: each method's best points"
    )


def _line(axes: Axes, points: np.ndarray, shade: str) -> None:
    best = points[nondominated(points)]
    best = best[np.argsort(best[:, 0])]
    if len(best) > 1:
        axes.plot(best[:, 0], best[:, 1], color=shade, linewidth=1.2, alpha=0.7)
