"""One cell of the tables: a method in a regime, tuned on seeds of its own and then measured on others."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.testbed.front import Front
from benchmarks.testbed.methods import (
    CORE,
    HIGHEST_RATE,
    LEARNING_RATES,
    LOWEST_RATE,
    METHODS,
    Method,
    Setting,
)
from benchmarks.testbed.problem import Problem
from benchmarks.testbed.regimes import REGIMES
from benchmarks.testbed.training import STEPS, Outcome, train

TUNING_SEEDS = tuple(range(100, 103))
PROBE_EVERY = 10
# A step with the gradients of two to four objectives over one with a single gradient, in one pass: the
# larger of the measured (docs/gradients.md, whole train phase, bf16), without the answering of the prompts.
ONE_PASS_COST = 1.13


@dataclass(frozen=True)
class Plan:
    """What a cell depends on besides its regime and its method."""

    seeds: int = 12
    steps: int = STEPS

    def told(self, method: Method) -> dict[str, Any]:
        """What must be the same for a finished cell to count."""
        return {
            **asdict(self),
            "tuning_seeds": list(TUNING_SEEDS),
            "method": repr(replace(method, label="", depends=None)),
        }


@cache
def instances(regime: str, seeds: tuple[int, ...]) -> tuple[Problem, Front]:
    """The problem and its front: the cells of a regime share them."""
    problem = Problem(REGIMES[regime], seeds)
    return problem, Front(problem)


def measured(regime: str, name: str, plan: Plan) -> dict[str, Any]:
    """The cell, as JSON: what tuning tried and chose, and per seed what came of it."""
    method = METHODS[name]
    chosen, tried = tuned(regime, method, plan)
    seeds = tuple(range(plan.seeds))
    problem, front = instances(regime, seeds)
    steps = {"equal_steps": plan.steps}
    if name in CORE:
        steps["equal_compute"] = round(plan.steps / ONE_PASS_COST) if method.of_gradients else plan.steps
    found: dict[int, dict[str, Any]] = {}
    for count in dict.fromkeys(steps.values()):
        outcome = train(problem, front, method, [chosen], steps=count, probe_every=PROBE_EVERY)
        found[count] = {"steps": count, **_by_seed(front, outcome)}
    return {
        "regime": regime,
        "method": name,
        "label": method.label,
        "what": plan.told(method),
        "tuned": asdict(chosen),
        "tried": tried,
        "possible": [best.value for best in front.possible],
        **{key: found[count] for key, count in steps.items()},
    }


def tuned(regime: str, method: Method, plan: Plan) -> tuple[Setting, list[dict[str, Any]]]:
    """The setting with the largest worst gain on the tuning seeds, and all that were tried."""
    problem, front = instances(regime, TUNING_SEEDS)

    def score(settings: Sequence[Setting]) -> list[float]:
        outcome = train(problem, front, method, settings, steps=plan.steps, seed=1)
        scores: list[float] = outcome.gains_SCM.min(-1).mean(0).tolist()
        return scores

    return search(method, score)


def search(
    method: Method, score: Callable[[Sequence[Setting]], list[float]]
) -> tuple[Setting, list[dict[str, Any]]]:
    """Try the grid, and further learning rates while the best one is the lowest or the highest so far."""
    tried: list[tuple[float, Setting]] = []
    rates: Sequence[float] = LEARNING_RATES
    while rates:
        settings = list(method.settings(rates))
        tried += zip(score(settings), settings, strict=True)
        best = max(tried, key=lambda one: one[0])[1]
        known = [setting.rate for _, setting in tried]
        rates = []
        if best.rate == min(known) and best.rate > LOWEST_RATE:
            rates = [best.rate / 2]
        elif best.rate == max(known) and best.rate < HIGHEST_RATE:
            rates = [best.rate * 2]
    return best, [{**asdict(setting), "worst": round(value, 5)} for value, setting in tried]


def _by_seed(front: Front, outcome: Outcome) -> dict[str, list[Any]]:
    """Of the only setting's policies, by seed."""
    gains = outcome.gains_SCM[:, 0]
    return {
        "worst": gains.min(-1).tolist(),
        "mean": gains.mean(-1).tolist(),
        "distance": [front.distance(s, row) for s, row in enumerate(gains)],
        "hurt": outcome.hurt_SCM[:, 0].mean(-1).tolist(),
        "hurt_any": outcome.hurt_SC[:, 0].tolist(),
        "kl": outcome.kl_SC[:, 0].tolist(),
        "gains": gains.tolist(),
    }


def kept(path: Path, what: dict[str, Any]) -> dict[str, Any] | None:
    """The finished cell of a file, if it was made from the same."""
    if not path.exists():
        return None
    found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return found if found["what"] == what else None


def keep(path: Path, cell: dict[str, Any]) -> None:
    """Write the cell whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    whole = path.with_suffix(".part")
    whole.write_text(json.dumps(_rounded(cell)), encoding="utf-8")
    whole.replace(path)


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _rounded(one) for key, one in value.items()}
    if isinstance(value, list | tuple):
        return [_rounded(one) for one in value]
    return round(value, 5) if isinstance(value, float | np.floating) else value
