"""The audit's picture: how often each method hurts an objective, and what it promises each over the steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from gapo_mega.evaluation.colours import CONFLICT, FAINT, INK, MUTED, colour
from gapo_mega.evaluation.files import replacing
from gapo_mega.evaluation.plots import STYLE
from gapo_mega.evaluation.series import Array, Series

# Methods whose cosines differ by less than this at every step are one line.
_SAME = 1e-6
# A cosine below this is rounding.
_ZERO = 1e-9
# A bar names at most this many objectives, those hurt most often.
_NAMED = 4


@dataclass(frozen=True)
class Curve:
    """One method over S steps and M objectives."""

    label: str
    cosines: Array  # [S, M], NaN where a step was left out
    hurt: Array  # [M] fraction of the steps that hurt this objective
    conflict: float  # fraction of the steps that hurt any


def write_picture(path: Path, names: Sequence[str], steps: Array, curves: Sequence[Curve]) -> None:
    """Write a PNG: one bar per method, also the legend, above one panel per objective over the steps."""
    heights = [0.45 * len(curves)] + [2.0] * len(names)
    lines = same_lines(curves)
    with style.context(STYLE):
        figure = Figure(figsize=(9.0, 1.5 + sum(heights)), layout="constrained")
        figure.suptitle(
            "What would each method have done?", x=0.01, ha="left", fontsize=13, fontweight="bold"
        )
        grid = figure.add_gridspec(len(heights), 1, height_ratios=heights)
        _draw_conflicts(figure.add_subplot(grid[0]), names, curves, lines)
        panels: list[Axes] = []
        for index, name in enumerate(names):
            first = panels[0] if panels else None
            axes = figure.add_subplot(grid[index + 1], sharex=first, sharey=first)
            series = Series(steps, {curve.label: curve.cosines[:, index] for curve in curves})
            _draw_cosines(axes, series, list(dict.fromkeys(lines)))
            axes.set_ylabel(name, color=INK, fontweight="bold")
            axes.tick_params(labelbottom=index == len(names) - 1)
            panels.append(axes)
        _title(panels[0], "Cosine of the direction with each objective's gradient", _key(series.window))
        _mark_hurt(panels)
        _step_axis(panels[-1], steps)
        figure.align_ylabels(panels)
        with replacing(path) as partial:
            figure.savefig(partial)


def same_lines(curves: Sequence[Curve]) -> list[int]:
    """For every curve, the index of the first curve that it coincides with: its own, or a smaller one."""
    found: list[int] = []
    for index, curve in enumerate(curves):
        same = (
            other
            for other in dict.fromkeys(found)
            if np.allclose(curve.cosines, curves[other].cosines, rtol=0, atol=_SAME, equal_nan=True)
        )
        found.append(next(same, index))
    return found


def _key(window: int) -> str:
    lines = "steps" if window == 1 else f"mean of {window} steps"
    return f"lines: {lines} · dots: steps that hurt"


def _draw_cosines(axes: Axes, series: Series, shown: Sequence[int]) -> None:
    labels = list(series.values)
    marker = "o" if len(series.steps) == 1 else ""  # a line through one point is invisible
    for place, index in enumerate(shown):
        values = series[labels[index]]
        # Later lines are thinner, so that lines that coincide for a while all stay visible.
        width = 1.5 + 0.5 * (len(shown) - 1 - place)
        smooth = np.where(np.isfinite(values), series.smooth(labels[index]), np.nan)
        axes.plot(series.steps, smooth, color=colour(index), linewidth=width, marker=marker)
        hurt = np.where(values < -_ZERO, values, np.nan)
        axes.plot(series.steps, hurt, "o", color=colour(index), alpha=0.6, markersize=3.5, markeredgewidth=0)


def _mark_hurt(panels: Sequence[Axes]) -> None:
    """Shade what is below zero; the panels share their vertical axis, so that they can be compared."""
    low, high = panels[0].get_ylim()
    low, high = min(low, -0.2), max(high, 0.2)
    for axes in panels:
        axes.axhspan(low, 0, color=CONFLICT, alpha=0.07, linewidth=0)
        axes.axhline(0, color="#9aa5b1", linewidth=1)
        axes.text(
            0.995, 0.03, "hurt", transform=axes.transAxes, ha="right", va="bottom", color=CONFLICT, fontsize=9
        )
    panels[0].set_ylim(low, high)
    panels[0].yaxis.set_major_locator(MaxNLocator(5))


def _draw_conflicts(axes: Axes, names: Sequence[str], curves: Sequence[Curve], lines: Sequence[int]) -> None:
    """Draw one bar per method on a track of all steps, below the name and the objectives hurt."""
    places = np.arange(len(curves))
    shades = [colour(index) for index in lines]
    axes.barh(places, np.ones(len(curves)), height=0.26, color=FAINT)
    axes.barh(places, [curve.conflict for curve in curves], height=0.26, color=shades)
    for place, curve, same, shade in zip(places, curves, lines, shades, strict=True):
        above = place - 0.36
        axes.plot([0.002, 0.028], [above, above], color=shade, linewidth=3.5, solid_capstyle="butt")
        axes.text(0.038, above, curve.label, va="center", fontsize=9.5, fontweight="bold")
        right = _who(curve, names)
        if same != place:
            right = f"same direction as {curves[same].label} · {right}"
        axes.text(1.0, above, right, va="center", ha="right", fontsize=9, color=MUTED)
    axes.set_xlim(0, 1)
    axes.set_ylim(len(curves) - 0.75, -0.65)
    axes.set_axis_off()
    asked = int(np.isfinite(curves[0].cosines).any(axis=1).sum())
    _title(axes, "Steps in conflict: those that hurt an objective", f"of {asked}")


def _who(curve: Curve, names: Sequence[str]) -> str:
    """The fraction of steps in conflict, and the objectives hurt, most often first."""
    order = [i for i in np.argsort(-curve.hurt, kind="stable") if curve.hurt[i] > 0]
    parts = [f"{names[i]} {curve.hurt[i]:.1%}" for i in order[:_NAMED]]
    parts += ["..."] if len(order) > _NAMED else []
    return f"{curve.conflict:.1%}" + (f": {', '.join(parts)}" if parts else "")


def _title(axes: Axes, text: str, detail: str) -> None:
    axes.set_title(text, loc="left", fontweight="bold", fontsize=11)
    axes.set_title(detail, loc="right", fontsize=8.5, color=MUTED)


def _step_axis(axes: Axes, steps: Array) -> None:
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    pad = max(0.5, 0.015 * (steps[-1] - steps[0]))
    axes.set_xlim(steps[0] - pad, steps[-1] + pad)
