"""What methods that follow progress are told of the scores before training."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from benchmarks.testbed.methods import Method
from benchmarks.testbed.problem import CONTEXTS, Array, Problem, drawn

# Of an instance: the state of `gapo_mega.progress.Progress` before the first step.
Start = Mapping[str, list[float]]


def starts(problem: Problem, method: Method, seed: int) -> list[Start] | None:
    """Means and spreads of the scores under pi_0 by instance; None where the first batch gives them."""
    if method.start_known:
        spreads_M = problem.scales_M * np.sqrt(1 + problem.regime.noises**2)
        return [_start(np.zeros(problem.regime.count), spreads_M)] * problem.count
    if method.start_answers:
        scores_SAM = answers_before(problem, method.start_answers, seed)
        return [_start(scores_AM.mean(0), scores_AM.std(0)) for scores_AM in scores_SAM]
    return None


def answers_before(problem: Problem, answers: int, seed: int) -> Array:
    """Scores of answers that pi_0 gives to the contexts in turn [S, A, M]."""
    random = np.random.default_rng(5_000 + seed)
    contexts = np.arange(answers) % CONTEXTS
    mass = np.cumsum(np.exp(problem.log_start_SXY.astype(np.float64)), -1)[:, contexts]
    chosen = drawn(mass / mass[..., -1:], random.random((problem.count, answers, 1)))[..., 0]
    instance = np.arange(problem.count)[:, None]
    rewards = problem.rewards_SXYM[instance, contexts[None], chosen].astype(np.float64)
    noise = problem.regime.noises * random.standard_normal(rewards.shape)
    found: Array = (rewards + noise) * problem.scales_M
    return found


def _start(means_M: Array, spreads_M: Array) -> Start:
    return {"baseline": means_M.tolist(), "unit": spreads_M.tolist(), "value": [0.0] * len(means_M)}
