"""Held-out scores over the steps of a run: the picture of its evaluations."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from matplotlib.figure import FigureBase
from matplotlib.ticker import MaxNLocator

from gapo_mega.evaluation.colours import INK, MUTED, colour
from gapo_mega.evaluation.plot_parts import put_name, put_title, step_axis
from gapo_mega.evaluation.series import Array, Series


def has_curves(series: Series, names: Sequence[str]) -> bool:
    """Whether the run was evaluated while training."""
    return f"heldout/{names[0]}" in series.values


def curve(series: Series, name: str) -> tuple[Array, Array, Array]:
    """Optimizer steps, mean held-out score and standard error of the change, before training (0) first.

    The score before training is what an evaluation's gain leaves of its score.
    """
    scores = series[f"heldout/{name}"]
    known = np.isfinite(scores)
    gains, errors = (series[f"{key}/{name}"][known] for key in ("heldout_gain", "heldout_gain_error"))
    before = scores[known][:1] - gains[:1]
    return (
        np.concatenate([[0.0], series.steps[known]]),
        np.concatenate([before, scores[known]]),
        np.concatenate([[0.0], np.nan_to_num(errors)]),
    )


def draw_heldout(figure: FigureBase, series: Series, names: Sequence[str]) -> None:
    """One panel per objective over a shared step axis; a ring marks the best evaluation."""
    put_title(figure, "Held-out reward", "bars: ±2 standard errors of the change")
    panels = figure.subplots(len(names), 1, sharex=True, squeeze=False)[:, 0]
    best = _best_update(series)
    for index, (name, axes) in enumerate(zip(names, panels, strict=True)):
        steps, scores, errors = curve(series, name)
        axes.errorbar(
            steps, scores, yerr=2 * errors, color=colour(index), marker="o", markersize=4.5, capsize=3,
            elinewidth=1.0,
        )  # fmt: skip
        axes.axhline(scores[0], color=MUTED, linewidth=1, linestyle=":")
        if best is not None:
            at = int(np.flatnonzero(steps == best)[0])
            axes.plot(
                steps[at], scores[at], "o", markersize=11, markerfacecolor="none", markeredgecolor=INK,
                label="best" if index == 0 else None,
            )  # fmt: skip
        put_name(axes, name, colour(index))
        axes.yaxis.set_major_locator(MaxNLocator(4))
    if best is not None:
        panels[0].legend(loc="best", fontsize=9)
    step_axis(panels[-1], series)
    panels[-1].set_xlim(left=-0.5)


def _best_update(series: Series) -> float | None:
    """The optimizer step of the best evaluation so far; None where none is chosen."""
    chosen = series.values.get("heldout_best_step")
    if chosen is None:
        return None
    known = chosen[np.isfinite(chosen)]
    # The first evaluation that named the last one's best is that evaluation.
    first = int(np.flatnonzero(chosen == known[-1])[0])
    return float(series.steps[first])
