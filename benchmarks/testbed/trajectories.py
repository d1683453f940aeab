"""The picture that explains the methods: where they go from the start to the front of two objectives."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from benchmarks.testbed.cells import Plan, instances
from benchmarks.testbed.methods import METHODS, Setting
from benchmarks.testbed.problem import Array
from benchmarks.testbed.store import Store
from benchmarks.testbed.training import train

REGIME = "kinds2"
TRACE_EVERY = 5
# The same for all: at its own best rate, a method that only loses would hardly leave the start.
RATE = 0.01
# Colours that all eyes tell apart (Okabe and Ito), each with a mark of its own.
SHOWN = {
    "weighted_sum": ("#000000", "s"),
    "mgda": ("#56B4E9", "v"),
    "gapo": ("#CC79A7", "D"),
    "gdpo": ("#E69F00", "^"),
    "gapo_adaptive_averaged": ("#0072B2", "o"),
    "tchebycheff_safe_averaged_told": ("#009E73", "*"),
}
_INK, _MUTED, _FAINT = "#1f2933", "#64707d", "#e4e8ec"


def traced(store: Store) -> dict[str, Any]:
    """Means over seeds: gains on the way of every shown method [T, 2], the front [K, 2], its best point."""
    settings = {name: replace(Setting(**store.get(REGIME, name)["tuned"]), rate=RATE) for name in SHOWN}
    what = {**asdict(store.plan), "settings": {name: asdict(one) for name, one in settings.items()}}
    found = store.kept(store.folder / "trajectories.json", what, lambda: _traced(store.plan, settings))
    return {key: found[key] for key in ("ways", "front", "best")}


def _traced(plan: Plan, settings: dict[str, Setting]) -> dict[str, Any]:
    problem, front = instances(REGIME, tuple(range(plan.seeds)))
    ways = {}
    for name, setting in settings.items():
        outcome = train(problem, front, METHODS[name], [setting], steps=plan.steps, trace_every=TRACE_EVERY)
        ways[name] = outcome.trace_TSCM[:, :, 0].mean(1).tolist()
    weights = np.stack([np.linspace(0.001, 0.999, 80), np.linspace(0.999, 0.001, 80)], 1)
    points = [[front.best(s, row).gains_M for row in weights] for s in range(problem.count)]
    best = np.mean([possible.gains_M for possible in front.possible], axis=0)
    return {"ways": ways, "front": np.mean(points, axis=0).tolist(), "best": best.tolist()}


def draw(found: dict[str, Any], path: Path) -> Path:
    """One panel, as wide as a README."""
    figure = Figure(figsize=(8.4, 5.2), dpi=150, layout="constrained")
    axes = figure.subplots()
    ways = {name: np.array(way) for name, way in found["ways"].items()}
    _limit(axes, [*ways.values(), np.array([found["best"], [0.0, 0.0]])])
    _ground(axes, np.array(found["front"]), np.array(found["best"]))
    for name, (colour, mark) in SHOWN.items():
        label = textwrap.fill(METHODS[name].label, 24)  # the panel has what the legend leaves
        _way(axes, ways[name], label, colour, mark)
    axes.legend(frameon=False, loc="center left", bbox_to_anchor=(1.0, 0.5), fontsize=10)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)
    return path


def _ground(axes: Axes, front_K2: Array, best_2: Array) -> None:
    """Where somebody loses, the front, and the start."""
    (left, right), (bottom, top) = axes.get_xlim(), axes.get_ylim()
    axes.axvspan(left, 0, color=_FAINT, alpha=0.7, linewidth=0)
    axes.axhspan(bottom, 0, xmin=-left / (right - left), color=_FAINT, alpha=0.7, linewidth=0)
    note: dict[str, Any] = {"color": _MUTED, "fontsize": 9, "textcoords": "offset points"}
    axes.annotate("the dense reward is hurt", (left, bottom), xytext=(8, 8), **note)
    axes.annotate("the rare reward is hurt", (right, bottom), xytext=(-8, 8), ha="right", **note)
    axes.plot(*front_K2.T, color=_INK, linewidth=2.5, label="the true front")
    axes.plot(*best_2, marker="P", markersize=11, color=_INK, linestyle="", label="best for the worse off")
    axes.plot(0, 0, marker="o", markersize=9, color="white", markeredgecolor=_INK, linestyle="")
    axes.annotate("start", (0, 0), xytext=(-34, -4), **note)
    axes.set(xlim=(left, right), ylim=(bottom, top))
    axes.grid(True, color=_FAINT)
    axes.set_axisbelow(True)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_xlabel("gain in the dense, noisy reward")
    axes.set_ylabel("gain in the rare reward")


def _limit(axes: Axes, shown: Sequence[Array]) -> None:
    """To what is shown beside the front, which goes far beyond it."""
    points_K2 = np.concatenate(shown)
    low_2, high_2 = points_K2.min(0), points_K2.max(0)
    margin_2 = 0.12 * (high_2 - low_2)
    axes.set_xlim(low_2[0] - margin_2[0], high_2[0] + margin_2[0])
    axes.set_ylim(low_2[1] - margin_2[1], high_2[1] + margin_2[1])


def _way(axes: Axes, way_T2: Array, label: str, colour: str, mark: str) -> None:
    axes.plot(*way_T2.T, color=colour, linewidth=1.8)
    size = {"*": 13, "o": 14}.get(mark, 9)  # the ends of two lie on each other
    axes.plot(
        *way_T2[-1],
        marker=mark,
        markersize=size,
        color=colour,
        linestyle="",
        label=label,
        markeredgecolor="white",
    )
