"""The report's pictures. Plain matplotlib figures: no pyplot, no global state.

Every ``draw_*`` function fills one figure or sub-figure, so that the overview is made of the same parts.
Colours are Okabe and Ito's, which stay apart for colour-blind readers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib import style
from matplotlib.axes import Axes
from matplotlib.figure import Figure, FigureBase
from matplotlib.ticker import MaxNLocator

from gapo_mega.config import GradientConfig
from gapo_mega.evaluation.colours import FAINT, INK, MUTED, PALETTE, colour, row_colour
from gapo_mega.evaluation.files import replacing
from gapo_mega.evaluation.heldout_curves import draw_heldout, has_curves
from gapo_mega.evaluation.plot_parts import (
    dots_and_line,
    grid_of_bars,
    has_lone_points,
    legend_height,
    mark_below_zero,
    nested_width,
    point_marker,
    put_legend,
    put_name,
    put_title,
    ratio_of,
    short,
    step_axis,
    where_taken,
)
from gapo_mega.evaluation.series import Series
from gapo_mega.evaluation.summary import Change, Summary
from gapo_mega.evaluation.terms import cosines_with_direction, in_metric, parameters_measured

STYLE: dict[str, Any] = {
    "font.family": "DejaVu Sans",
    "font.size": 10,
    "text.color": INK,
    "axes.edgecolor": "#9aa5b1",
    "axes.labelcolor": MUTED,
    "axes.grid": True,
    "axes.axisbelow": True,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "grid.color": FAINT,
    "grid.linewidth": 0.8,
    "xtick.color": MUTED,
    "ytick.color": MUTED,
    "legend.frameon": False,
    "lines.linewidth": 2.0,
    "figure.dpi": 150,
    "savefig.facecolor": "white",
    "savefig.bbox": "tight",
    "savefig.pad_inches": 0.18,
}


WIDTH = 5.6  # inches of a single picture: its texts can be read on a phone
_STYLES = ("-", "--", ":")  # of lines whose colours come again


@dataclass(frozen=True)
class Picture:
    """A written PNG: its file name, and what it shows in one sentence (the page's alternative text)."""

    file: str
    caption: str


def write_pictures(
    directory: Path,
    series: Series,
    names: Sequence[str],
    summary: Summary,
    gradients: GradientConfig,
    rows: Sequence[str] | None = None,
    label: str = "after",
) -> list[Picture]:
    """Every PNG of a run into ``directory``; the overview comes first, which repeats some of the others.

    ``gradients`` says over which parameters, and in which metric, norms and cosines were measured, ``rows``
    whose gradients were, if not the objectives' alone: a scalarizer's, beside the objectives' in audited
    steps. ``label`` says when the summary's second number was measured.
    """
    scalarized, rows = rows is not None, list(rows or names)
    pairs = list(combinations(rows, 2))
    over = f"over {parameters_measured(gradients)}{in_metric(gradients)}"
    height = 1.2 + 1.5 * len(names)
    down, abreast = grid_of_bars(len(names))
    more = legend_height(len(pairs))
    top, bottom = max(4.4, 0.95 * len(names), 3.4 * down if summary else 0.0), 4.0 + more
    plans: list[tuple[str, str, tuple[float, float], Callable[[FigureBase], None]]] = [
        (
            "overview.png",
            "The run in one picture.",
            (12.0, top + bottom),
            lambda f: draw_overview(f, series, names, summary, gradients, rows, label, top / bottom),
        ),
        (
            "rewards.png",
            "Mean reward of the responses sampled for training, per objective: dots are steps, the line is a "
            "moving average.",
            (WIDTH, max(3.6, height)),
            lambda f: draw_rewards(f, series, names),
        ),
        (
            "gradient_norms.png",
            f"Norm of each objective's gradient {over}, on a logarithmic scale.",
            (WIDTH, 3.6),
            lambda f: draw_norms(f, series, names, gradients, rows),
        ),
        (
            "kl.png",
            "Mean of log pi - log pi_ref over the sampled tokens, an estimate of the divergence from the "
            "reference that may fall below zero.",
            (WIDTH, 3.6),
            lambda f: draw_kl(f, series),
        ),
    ]
    if set(names) <= set(rows):
        progress = (
            "progress.png",
            f"Cosine between the direction and each objective's gradient {over}: below zero, a step along "
            "the direction hurts the objective to first order.",
            (WIDTH, 3.6),
            lambda f: draw_progress(f, series, names, rows),
        )
        plans.insert(-1, progress)
    if not scalarized:
        weights = (
            "weights.png",
            "Left: each objective's contribution to the direction, |w_i| ‖g_i‖ over the sum of all. Right: "
            "the weights w_i.",
            (WIDTH, 3.6),
            lambda f: draw_weights(f, series, names),
        )
        plans.insert(-1, weights)
    if f"reward_weight/{names[0]}" in series.values:
        of_scores = "The weight of each objective's score in the one reward that is trained on."
        of_gradients = "The weights that the scalarizer starts from, before they are made to hurt nobody."
        reward_weights = (
            "reward_weights.png",
            of_scores if scalarized else of_gradients,
            (WIDTH, 3.6),
            lambda f: draw_reward_weights(f, series, names, scalarized),
        )
        plans.insert(-1, reward_weights)
    if pairs:
        cosines = (
            "cosines.png",
            f"Cosine between the objectives' gradients {over}: below zero they are opposed.",
            (WIDTH, 3.6 + more),
            lambda f: draw_cosines(f, series, pairs),
        )
        plans.insert(3, cosines)
    if summary:
        before_after = (
            "before_after.png",
            f"Mean reward on held-out prompts before training and {label}, the change, in brackets in "
            "standard errors (s.e.), and the finding; whiskers span two standard errors of the paired "
            "difference either way.",
            (max(WIDTH, 2.2 * abreast), 3.6 * down),
            lambda f: draw_before_after(f, summary, label),
        )
        plans.insert(1, before_after)
    if has_curves(series, names):
        curves = (
            "heldout.png",
            "Mean reward on held-out prompts while training; bars span two standard errors of the paired "
            "change since before training either way.",
            (WIDTH, max(3.6, height)),
            lambda f: draw_heldout(f, series, names),
        )
        plans.insert(2 if summary else 1, curves)
    with style.context(STYLE):
        for file, _, size, draw in plans:
            figure = Figure(figsize=size, layout="constrained")
            draw(figure)
            with replacing(directory / file) as partial:
                figure.savefig(partial)
    return [Picture(file, caption) for file, caption, _, _ in plans]


def draw_overview(
    figure: FigureBase,
    series: Series,
    names: Sequence[str],
    summary: Summary,
    gradients: GradientConfig,
    rows: Sequence[str],
    label: str,
    ratio: float,
) -> None:
    """2 x 2: rewards, held-out before and after (KL without held-out prompts), norms, cosines.

    ``ratio``: height of the first row over that of the second. A run with a single gradient that is not an
    objective's has its KL in place of cosines.
    """
    panels = np.asarray(figure.subfigures(2, 2, wspace=0.04, hspace=0.04, height_ratios=[ratio, 1.0]))
    draw_rewards(panels[0, 0], series, names)
    if summary:
        draw_before_after(panels[0, 1], summary, label)
    else:
        draw_kl(panels[0, 1], series)
    draw_norms(panels[1, 0], series, names, gradients, rows)
    pairs = list(combinations(rows, 2))
    if pairs:
        draw_cosines(panels[1, 1], series, pairs)
    elif set(names) <= set(rows):
        draw_progress(panels[1, 1], series, names, rows)
    else:
        draw_kl(panels[1, 1], series)


def draw_rewards(figure: FigureBase, series: Series, names: Sequence[str]) -> None:
    """One panel per objective over a shared step axis, because their scales differ."""
    line = "steps" if series.window == 1 else f"mean of {series.window}"
    put_title(figure, "Reward while training", f"dots: steps · line: {line}")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    for index, (name, axes) in enumerate(zip(names, panels, strict=True)):
        dots_and_line(axes, series, f"reward/{name}", colour(index))
        put_name(axes, name, colour(index))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    step_axis(panels[-1], series)


def draw_norms(
    figure: FigureBase, series: Series, names: Sequence[str], gradients: GradientConfig, rows: Sequence[str]
) -> None:
    """sqrt(G_ii) of every gradient; logarithmic, because they may differ by orders of magnitude."""
    put_title(
        figure,
        "Gradient norm per objective" if rows == names else "Gradient norm",
        f"{parameters_measured(gradients)} · log scale",
    )
    axes = figure.subplots()
    for row in rows:
        dots_and_line(axes, series, f"grad_norm/{row}", row_colour(row, names), label=row)
    if any((series[f"grad_norm/{row}"] > 0).any() for row in rows):
        axes.set_yscale("log")
    axes.set_ylabel("‖g‖")
    step_axis(axes, series)
    put_legend(figure, axes)


def draw_cosines(figure: FigureBase, series: Series, pairs: Sequence[tuple[str, str]]) -> None:
    """Cosines between gradients, one line per pair of objectives."""
    put_title(figure, "Are the objectives opposed?", "cosine of their gradients")
    axes = figure.subplots()
    for index, (a, b) in enumerate(pairs):
        # A single pair would take the first objective's colour, so it gets a neutral one.
        shade = INK if len(pairs) == 1 else colour(index)
        label = f"{short(a, 14)} · {short(b, 14)}"
        style_of_line = _STYLES[index // len(PALETTE) % len(_STYLES)]
        dots_and_line(axes, series, f"cosine/{a}/{b}", shade, label, style_of_line)
    mark_below_zero(axes, "opposed")
    axes.set_ylabel("cosine")
    step_axis(axes, series)
    put_legend(figure, axes)


def draw_progress(
    figure: FigureBase, series: Series, names: Sequence[str], rows: Sequence[str] | None = None
) -> None:
    """cos(direction, g_i) = (G w)_i / (||g_i|| ||direction||), all in the inner product of G."""
    rows = list(rows or names)
    put_title(figure, "Does the direction hurt an objective?", "cosine: direction, gradient")
    axes = figure.subplots()
    parts = ("grad_norm", "weight", "predicted_change")
    norms, weights, predicted = (
        np.stack([series[f"{part}/{row}"] for row in rows], axis=1) for part in parts
    )
    cosines = cosines_with_direction(norms, weights, predicted)
    for index, name in enumerate(names):
        taken = where_taken(series, cosines[:, rows.index(name)])
        axes.plot(
            series.steps,
            taken,
            color=colour(index),
            label=name,
            linewidth=nested_width(index, len(names)),
            marker="o" if has_lone_points(taken) else "",
        )
    mark_below_zero(axes, "hurt")
    axes.set_ylabel("cosine")
    step_axis(axes, series)
    put_legend(figure, axes)


def draw_weights(figure: FigureBase, series: Series, names: Sequence[str]) -> None:
    """Two panels: |w_i| ||g_i|| / sum_j |w_j| ||g_j||, and w_i itself."""
    left, right = figure.subplots(1, 2)
    used = {name: where_taken(series, series[f"weight/{name}"]) for name in names}
    lengths = np.abs([used[name] * series[f"grad_norm/{name}"] for name in names])
    shares = ratio_of(lengths, lengths.sum(axis=0, keepdims=True))
    # Each step owns the interval around it, so that a single step is visible and a skipped one leaves a gap.
    edges = np.concatenate([series.steps - 0.5, series.steps[-1:] + 0.5])
    floor = np.zeros(len(series.steps))
    for index, name in enumerate(names):
        top = floor + shares[index]
        left.stairs(top, edges, baseline=floor, fill=True, color=colour(index), label=short(name, 26))
        floor = top
        width = nested_width(index, len(names))
        right.plot(
            series.steps, used[name], color=colour(index), linewidth=width, marker=point_marker(series)
        )
    left.set_ylim(0, 1)
    left.set_title("Contribution to the direction", loc="left", fontweight="bold", fontsize=11)
    weights = np.concatenate(list(used.values()))
    positive = weights[np.isfinite(weights) & (weights > 0)]
    # A weight of zero (an objective left out) has no place on a logarithmic axis.
    if len(positive) == np.isfinite(weights).sum() > 0 and positive.max() > 10 * positive.min():
        right.set_yscale("log")
    right.set_title("Weight", loc="left", fontweight="bold", fontsize=11)
    step_axis(left, series)
    step_axis(right, series)
    left.legend(loc="lower left", fontsize=9, frameon=True, framealpha=0.9, edgecolor="none")


def draw_reward_weights(figure: FigureBase, series: Series, names: Sequence[str], of_scores: bool) -> None:
    """A scalarizer's weights over steps: of the scores in one reward, or for gradients to start from."""
    if of_scores:
        put_title(figure, "Weights of the scores", "in the one reward")
    else:
        put_title(figure, "Weights of the scalarizer", "where every update starts")
    axes = figure.subplots()
    for index, name in enumerate(names):
        values = series[f"reward_weight/{name}"]
        axes.plot(series.steps, values, color=colour(index), label=name, marker=point_marker(series))
    axes.set_ylabel("weight")
    step_axis(axes, series)
    put_legend(figure, axes)


def draw_kl(figure: FigureBase, series: Series) -> None:
    """The KL estimate over steps."""
    put_title(figure, "Divergence from the reference policy", "estimate per sampled token")
    axes = figure.subplots()
    dots_and_line(axes, series, "kl", INK)
    axes.set_ylabel("KL (nats)")
    step_axis(axes, series)


def draw_before_after(figure: FigureBase, summary: Summary, label: str = "after") -> None:
    """Two bars per objective, each objective on its own scale."""
    prompts = next(iter(summary.values())).samples
    put_title(
        figure,
        "Before and after training" if label == "after" else f"Before and {label}",
        f"{prompts} prompts · ±2 standard errors",
    )
    panels = figure.subplots(*grid_of_bars(len(summary)), squeeze=False).ravel()
    for axes in panels[len(summary) :]:
        axes.remove()
    for index, ((name, found), axes) in enumerate(zip(summary.items(), panels[: len(summary)], strict=True)):
        _bars(axes, found, colour(index), label)
        ratio = found.in_standard_errors
        change = f"{found.difference:+.3g}"
        note = (change if ratio is None else f"{change}  ({ratio:+.1f} s.e.)").replace("-", "\N{MINUS SIGN}")
        note = f"{note}\n{found.finding}"
        axes.set_title(f"{short(name, 20)}\n\n", color=colour(index), fontweight="bold", fontsize=10)
        axes.text(0.5, 1.03, note, transform=axes.transAxes, ha="center", color=MUTED, fontsize=9)


def _bars(axes: Axes, found: Change, shade: str, label: str) -> None:
    values = (found.before, found.after)
    axes.bar([0, 1], values, width=0.62, color=["#c5ccd3", shade])
    whisker = 2 * found.standard_error if np.isfinite(found.standard_error) else 0.0
    if whisker:
        axes.errorbar(1, values[1], yerr=whisker, color=INK, capsize=5, linewidth=1.4)
    axes.axhline(0, color="#9aa5b1", linewidth=0.8)
    axes.margins(y=0.16)
    for x, value, reach in ((0, values[0], 0.0), (1, values[1], whisker)):
        up = value >= 0
        axes.annotate(
            f"{value:.3g}".replace("-", "\N{MINUS SIGN}"),
            (x, value + reach if up else value - reach),
            textcoords="offset points",
            xytext=(0, 4 if up else -4),
            ha="center",
            va="bottom" if up else "top",
            fontsize=9,
        )
    axes.set_xticks([0, 1], ["before", label.replace(" (", "\n(")])
    axes.set_xlim(-0.6, 1.6)
    axes.grid(visible=False, axis="x")
    axes.yaxis.set_major_locator(MaxNLocator(5))
