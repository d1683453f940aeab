"""The true Pareto front of a problem, and how far a policy is from it.

The policy that is best for ``sum_i w_i J_i`` is known in closed form, w being any weights >= 0 with sum W:

    pi_w proportional to pi_0 exp(sum_i w_i u_i / (beta W)),
    max sum_i w_i J_i = beta W  mean over x of  log E_pi_0[exp(sum_i w_i u_i / (beta W))].

The set of all attainable values is convex where policies are arbitrary, so these are all the points of the
front. A *gain* is ``J_i / D_i``: 0 at the start (J_i(pi_0) = 0), 1 at the best for objective i alone.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property

import moocore
import numpy as np
from scipy.optimize import minimize

from benchmarks.testbed.problem import BETA, CONTEXTS, Array, Problem


@dataclass(frozen=True)
class Best:
    """What is best for one set of weights on gains."""

    value: float  # the largest sum_i w_i gain_i
    gains_M: Array  # of the policy that reaches it


class Front:
    """Of every instance of ``problem``."""

    def __init__(self, problem: Problem) -> None:
        self._problem = problem
        self._rewards_SXYM = problem.rewards_SXYM.astype(np.float64)
        self._start_SXY = np.exp(problem.log_start_SXY.astype(np.float64))
        self._start_SXY /= self._start_SXY.sum(-1, keepdims=True)

    @cached_property
    def alone_SM(self) -> Array:
        """D_i: the most that J_i can be."""
        count = self._problem.regime.count
        each = np.eye(count)
        instances = range(self._problem.count)
        return np.array([[self._best(s, each[i])[0] for i in range(count)] for s in instances])

    @cached_property
    def possible(self) -> list[Best]:
        """The policy whose worst gain is largest; ``value`` is that gain, of every instance."""
        count = self._problem.regime.count
        return [self._least_surplus(s, np.zeros(count)) for s in range(self._problem.count)]

    def best(self, instance: int, weights_M: Array) -> Best:
        """Of all policies, the best for the weighted sum of gains."""
        value, objectives = self._best(instance, weights_M / self.alone_SM[instance])
        return Best(value, objectives / self.alone_SM[instance])

    def gains(self, rewards_SM: Array, kl_S: Array) -> Array:
        """Gains [S, M] from what ``Problem.values`` returns."""
        return (rewards_SM - BETA * kl_S[:, None]) / self.alone_SM

    def distance(self, instance: int, gains_M: Array) -> float:
        """By how much all gains could still rise at once; 0 on the front."""
        return max(0.0, self._least_surplus(instance, gains_M).value)

    def sample(self, instance: int, count: int) -> Array:
        """``count`` points of the front [count, M]: half of them near the best worst gain."""
        random = np.random.default_rng(0)
        centre = self._weights_of_possible[instance]
        evenly = random.dirichlet(np.ones(len(centre)), count - count // 2)
        nearby = random.dirichlet(np.maximum(20.0 * centre, 0.2), count // 2)
        weights = np.maximum(np.concatenate([evenly, nearby]), 1e-6)
        return np.array([self.best(instance, row).gains_M for row in weights])

    @cached_property
    def _weights_of_possible(self) -> list[Array]:
        zero = np.zeros(self._problem.regime.count)
        return [self._least_weights(s, zero) for s in range(self._problem.count)]

    def _least_surplus(self, instance: int, gains_M: Array) -> Best:
        """min over weights with sum 1 of ``max over policies of sum_i w_i (gain_i - gains_i)``."""
        weights = self._least_weights(instance, gains_M)
        found = self.best(instance, weights)
        return Best(found.value - float(weights @ gains_M), found.gains_M)

    def _least_weights(self, instance: int, gains_M: Array) -> Array:
        # Convex in the weights, and the gradient is the gains of the best policy.
        def surplus(weights_M: Array) -> tuple[float, Array]:
            found = self.best(instance, np.maximum(weights_M, 1e-12))
            return found.value - float(weights_M @ gains_M), found.gains_M - gains_M

        count = len(gains_M)
        solved = minimize(
            surplus,
            np.full(count, 1 / count),
            jac=True,
            method="SLSQP",
            bounds=[(0.0, 1.0)] * count,
            constraints={"type": "eq", "fun": lambda w: w.sum() - 1, "jac": lambda w: np.ones(count)},
            options={"ftol": 1e-9, "maxiter": 60},
        )
        weights: Array = np.maximum(solved.x, 1e-12)
        shares: Array = weights / weights.sum()
        return shares

    def _best(self, instance: int, weights_M: Array) -> tuple[float, Array]:
        """The largest ``sum_i w_i J_i``, and the J [M] that reach it."""
        total = float(weights_M.sum())
        rewards_XYM, start_XY = self._rewards_SXYM[instance], self._start_SXY[instance]
        tilt_XY = rewards_XYM @ (weights_M / (BETA * total))
        highest_X = tilt_XY.max(-1, keepdims=True)
        raised_XY = start_XY * np.exp(tilt_XY - highest_X)
        mass_X = raised_XY.sum(-1, keepdims=True)
        log_mass_X = np.log(mass_X) + highest_X
        pi_XY = raised_XY / mass_X
        rewards_M = np.einsum("xy,xyi->i", pi_XY, rewards_XYM) / CONTEXTS
        kl = float((pi_XY * (tilt_XY - log_mass_X)).sum()) / CONTEXTS
        return BETA * total * float(log_mass_X.mean()), rewards_M - BETA * kl


def hypervolume(gains_KM: Array) -> float:
    """The volume between the starting policy (gains 0) and the points that are better everywhere."""
    return float(moocore.hypervolume(gains_KM, ref=np.zeros(gains_KM.shape[1]), maximise=True))
