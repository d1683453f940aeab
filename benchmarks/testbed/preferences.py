"""The front that a method reaches over preferences, as a share of the true front's hypervolume."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import asdict, replace
from typing import Any

import numpy as np

from benchmarks.testbed.cells import TUNING_SEEDS, Plan, instances
from benchmarks.testbed.front import hypervolume
from benchmarks.testbed.methods import METHODS, Method, Setting
from benchmarks.testbed.training import train

SEEDS = 6  # of the plan's, at most
REGIMES_OF_FRONTS = ("benign", "kinds3", "kinds2", "saturating", "noisy", "majority")
METHODS_OF_FRONTS = (
    "weighted_sum",
    "gdpo",
    "tchebycheff",
    "tchebycheff_told",
    "tchebycheff_safe_averaged",
    "tchebycheff_safe_averaged_told",
    "gapo_adaptive_averaged",
    "p_gapo",
    "p_gapo_safe_averaged",
    "upgrad_normalized_averaged",
)
TRUE_POINTS = 400  # of the true front's sample


def preferences(count: int) -> list[list[float]]:
    """Ten of two objectives, evenly spaced, and ten of three: a grid whose numbers are all positive."""
    if count == 2:
        return [[(i + 0.5) / 10, (9.5 - i) / 10] for i in range(10)]
    assert count == 3, count
    grid = (row for row in itertools.product(range(4), repeat=3) if sum(row) == 3)
    return [[(number + 0.25) / 3.75 for number in row] for row in grid]


def front_of(regime: str, name: str, plan: Plan, around: Setting) -> dict[str, Any]:
    """Hypervolumes by seed, over the true front's, of the method with the best of three learning rates.

    ``around``: what tuning chose for an equal preference.
    """
    method = METHODS[name]
    rates = [around.rate / 2, around.rate, around.rate * 2]
    by_rate = {
        rate: _shares(regime, method, replace(around, rate=rate), TUNING_SEEDS[:2], 3, plan.steps)
        for rate in rates
    }
    best = max(by_rate, key=lambda rate: float(np.mean(by_rate[rate])))
    chosen = replace(around, rate=best)
    return {
        "regime": regime,
        "method": name,
        "label": method.label,
        "tuned": asdict(chosen),
        "hypervolume": _shares(regime, method, chosen, range(min(SEEDS, plan.seeds)), 1, plan.steps),
        "tried": {str(rate): float(np.mean(shares)) for rate, shares in by_rate.items()},
    }


def _shares(
    regime: str, method: Method, setting: Setting, seeds: Sequence[int], every: int, steps: int
) -> list[float]:
    """Of every seed, with every ``every``-th preference."""
    problem, front = instances(regime, tuple(seeds))
    chosen = preferences(problem.regime.count)[::every]
    assert method.preferred is not None, method.label
    settings = [
        replace(setting, options={**setting.options, method.preferred: preference}) for preference in chosen
    ]
    gains_SCM = train(problem, front, method, settings, steps=steps).gains_SCM
    volumes = [hypervolume(gains) for gains in gains_SCM]
    true = [hypervolume(front.sample(s, TRUE_POINTS)) for s in range(problem.count)]
    return [volume / whole for volume, whole in zip(volumes, true, strict=True)]
