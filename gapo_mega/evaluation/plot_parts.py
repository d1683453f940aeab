"""What the report's pictures are made of: lines, axes and titles."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from gapo_mega.evaluation.colours import CONFLICT, MUTED
from gapo_mega.evaluation.series import Array, Series

_FEW = 6  # lines whose legend has room among them
_ABREAST = 3  # objectives whose bars stand side by side


def short(name: str, most: int) -> str:
    """``name``, of a long one the beginning."""
    return name if len(name) <= most else f"{name[: most - 1]}\N{HORIZONTAL ELLIPSIS}"


def put_name(axes: Axes, name: str, shade: str) -> None:
    """An objective's name over its panel, where a long one has room."""
    axes.set_title(short(name, 50), loc="left", color=shade, fontweight="bold", fontsize=10, pad=3)


def dots_and_line(
    axes: Axes, series: Series, key: str, shade: str, label: str | None = None, line_style: str = "-"
) -> None:
    """The steps' values as dots, and their moving average as a line."""
    axes.plot(series.steps, series[key], "o", color=shade, alpha=0.3, markersize=3.5, markeredgewidth=0)
    line = series.smooth(key)
    marker = "o" if has_lone_points(line) else ""
    axes.plot(series.steps, line, line_style, color=shade, label=label, marker=marker)


def where_taken(series: Series, values: Array) -> Array:
    """NaN in place of the values at steps that were skipped: no weight was used there."""
    skipped = series.values.get("skipped")
    return values if skipped is None else np.where(skipped > 0, np.nan, values)


def point_marker(series: Series) -> str:
    """A dot for a single step, where a line would be invisible; else none."""
    return "o" if len(series.steps) == 1 else ""


def has_lone_points(values: Array) -> bool:
    """Whether a value has no neighbour, as those of audited steps: a line would not show it."""
    known = np.concatenate([[False], np.isfinite(values), [False]])
    return bool((known[1:-1] & ~known[:-2] & ~known[2:]).any())


def nested_width(index: int, count: int) -> float:
    """Thinner for later lines, so that lines that coincide (two unit gradients, say) stay visible."""
    return 1.6 + 1.2 * (count - 1 - index)


def ratio_of(part: Array, whole: Array) -> Array:
    """``part / whole``, NaN where ``whole`` is 0."""
    part, whole = np.broadcast_arrays(part, whole)
    result: Array = np.divide(part, whole, out=np.full(part.shape, np.nan), where=whole != 0)
    return result


def mark_below_zero(axes: Axes, text: str) -> None:
    """Shade what lies below zero, and write ``text`` there."""
    low, high = axes.get_ylim()
    low, high = min(low, -0.1), max(high, 0.1)
    axes.axhspan(low, 0, color=CONFLICT, alpha=0.07, linewidth=0)
    axes.axhline(0, color="#9aa5b1", linewidth=1)
    axes.text(0.99, 0.02, text, transform=axes.transAxes, ha="right", va="bottom", color=CONFLICT, fontsize=9)
    axes.set_ylim(low, high)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def put_title(figure: FigureBase, title: str, detail: str) -> None:
    """Bold title at the left, what the marks mean in grey at the right."""
    figure.suptitle(title, x=0.02, ha="left", fontsize=12, fontweight="bold")
    figure.text(0.98, 0.985, detail, ha="right", va="top", fontsize=8.5, color=MUTED)


def step_axis(axes: Axes, series: Series) -> None:
    """Label the axis of optimizer steps, and leave a margin."""
    axes.set_xlabel("optimizer step")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    first, last = series.steps[0], series.steps[-1]
    pad = max(0.5, 0.015 * (last - first))
    axes.set_xlim(first - pad, last + pad)


def grid_of_bars(objectives: int) -> tuple[int, int]:
    """How many of their bars stand below one another, and side by side."""
    return -(-objectives // _ABREAST), min(objectives, _ABREAST)


def put_legend(figure: FigureBase, axes: Axes) -> None:
    """A legend where it hides least; one of many lines below the panel, in two columns."""
    lines, labels = axes.get_legend_handles_labels()
    if len(lines) <= _FEW:
        axes.legend(lines, [short(label, 40) for label in labels], loc="best", fontsize=9)
    else:
        figure.legend(lines, labels, loc="outside lower left", ncols=2, fontsize=8)


def legend_height(lines: int) -> float:
    """Inches that ``put_legend`` takes below the panel."""
    return 0.0 if lines <= _FEW else 0.3 + 0.17 * ((lines + 1) // 2)
