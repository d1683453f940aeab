"""One cell of the tables: a method in a regime, tuned on seeds of its own and then measured on others."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from typing import Any

from benchmarks.testbed.front import Front
from benchmarks.testbed.methods import (
    HIGHEST_RATE,
    LEARNING_RATES,
    LOWEST_RATE,
    METHODS,
    Method,
    Setting,
)
from benchmarks.testbed.problem import Problem
from benchmarks.testbed.regimes import REGIMES
from benchmarks.testbed.training import STEPS, train

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
            "method": method.described(),
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
    _, front = instances(regime, tuple(range(plan.seeds)))
    return {
        **_head(regime, name, chosen),
        "tried": tried,
        "possible": [best.value for best in front.possible],
        **_by_seed(regime, method, chosen, plan, plan.steps, PROBE_EVERY),
    }


def at_equal_compute(regime: str, name: str, plan: Plan, chosen: Setting) -> dict[str, Any]:
    """The same with as many steps as cost what ``plan.steps`` with a single gradient do."""
    method = METHODS[name]
    steps = round(plan.steps / ONE_PASS_COST) if method.of_gradients else plan.steps
    return {
        **_head(regime, name, chosen),
        **_by_seed(regime, method, chosen, plan, steps, 0),
    }


def told_with(plan: Plan, method: Method, chosen: Setting) -> dict[str, Any]:
    """What must be the same for a result with a setting to count."""
    return {**plan.told(method), "chosen": asdict(chosen)}


def _head(regime: str, name: str, chosen: Setting) -> dict[str, Any]:
    return {"regime": regime, "method": name, "label": METHODS[name].label, "tuned": asdict(chosen)}


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


def _by_seed(
    regime: str, method: Method, chosen: Setting, plan: Plan, steps: int, probe_every: int
) -> dict[str, Any]:
    """What the policies of all seeds came to."""
    problem, front = instances(regime, tuple(range(plan.seeds)))
    outcome = train(problem, front, method, [chosen], steps=steps, probe_every=probe_every)
    gains = outcome.gains_SCM[:, 0]
    found: dict[str, Any] = {
        "steps": steps,
        "worst": gains.min(-1).tolist(),
        "mean": gains.mean(-1).tolist(),
        "distance": [front.distance(s, row) for s, row in enumerate(gains)],
        "kl": outcome.kl_SC[:, 0].tolist(),
    }
    if probe_every:
        found["hurt"] = outcome.hurt_SCM[:, 0].mean(-1).tolist()
        found["hurt_any"] = outcome.hurt_SC[:, 0].tolist()
    return found
