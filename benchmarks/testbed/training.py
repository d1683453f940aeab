"""Training of many policies at once: S instances times C settings, with common random numbers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np

from benchmarks.testbed.front import Front
from benchmarks.testbed.methods import Method, Setting
from benchmarks.testbed.problem import BETA, CONTEXTS, RESPONSES, Array, Problem, drawn, objective_gradients
from benchmarks.testbed.signal import Batch, Signal
from benchmarks.testbed.start import starts

STEPS = 200
SAMPLES = 8
_BETA1, _BETA2, _EPSILON = 0.9, 0.95, 1e-30  # no epsilon: gradients of any scale give the same step


@dataclass(frozen=True)
class Outcome:
    """What S instances came to with C settings."""

    gains_SCM: Array
    rewards_SCM: Array  # E[u_i]: of their spread at the start
    kl_SC: Array
    hurt_SCM: Array  # share of the probed steps under which J_i falls to first order; NaN without probes
    hurt_SC: Array  # of those under which some J_i falls
    trace_TSCM: Array  # gains on the way, of the steps that were asked for


@dataclass
class Adam:
    """Adam's step of many vectors [N, D]; tests compare it with torch's."""

    shape: tuple[int, int]
    _taken: int = 0
    _first: Array = field(init=False)
    _second: Array = field(init=False)

    def __post_init__(self) -> None:
        self._first, self._second = np.zeros(self.shape), np.zeros(self.shape)

    def step(self, gradient_ND: Array) -> Array:
        """What to add to the parameters, for a learning rate of 1."""
        self._taken += 1
        self._first = _BETA1 * self._first + (1 - _BETA1) * gradient_ND
        self._second = _BETA2 * self._second + (1 - _BETA2) * gradient_ND**2
        found: Array = self._first / (1 - _BETA1**self._taken) / self._size()
        return found

    @property
    def metric_ND(self) -> Array:
        """What Adam divides gradients by, inverted; 1 before the first step, as the engine has it."""
        return 1 / self._size() if self._taken else np.ones(self.shape)

    def _size(self) -> Array:
        found: Array = np.sqrt(self._second / (1 - _BETA2**self._taken)) + _EPSILON
        return found


class Sampler:
    """Draws the contexts of a step and the answers of all policies to them, on the same random numbers."""

    def __init__(self, problem: Problem, settings: int, seed: int, prompts: int) -> None:
        self._problem, self._settings, self._prompts = problem, settings, prompts
        self._random = np.random.default_rng(777 + seed)

    def batch(self, theta_SCD: Array) -> Batch:
        """The samples of a step from policies [S, C, D]; n = s C + c."""
        problem, random, prompts = self._problem, self._random, self._prompts
        instances, settings, count = problem.count, self._settings, problem.count * self._settings
        contexts = np.sort(random.permutation(CONTEXTS)[:prompts])
        features = problem.features_SXYD[:, contexts]
        flat = features.reshape(instances, prompts * RESPONSES, -1)
        log_start = problem.log_start_SXY[:, contexts]
        shift = np.matmul(theta_SCD.astype(np.float32), flat.swapaxes(1, 2))
        logits = shift.reshape(instances, settings, prompts, RESPONSES) + log_start[:, None]
        raised = np.exp(logits - logits.max(-1, keepdims=True))
        mass = np.cumsum(raised, -1, dtype=np.float64)
        total = mass[..., -1:]
        numbers = np.repeat(random.random((instances, prompts, SAMPLES)), settings, 0)
        chosen = drawn((mass / total).reshape(count, prompts, RESPONSES), numbers)
        noise = np.repeat(
            random.standard_normal((instances, prompts, SAMPLES, problem.regime.count)), settings, 0
        )

        row = np.repeat(np.arange(instances), settings)[:, None, None]
        at = (row, np.arange(prompts)[None, :, None], chosen)
        rewards = problem.rewards_SXYM[:, contexts][at].astype(np.float64) + problem.regime.noises * noise
        log_pi = (logits - logits.max(-1, keepdims=True) - np.log(total)).reshape(count, prompts, RESPONSES)
        kl = np.take_along_axis(log_pi, chosen, 2) - log_start[at]
        pi = (raised / total).astype(np.float32).reshape(instances, settings, prompts, 1, RESPONSES)
        mean_feature = np.matmul(pi, features[:, None])[..., 0, :].reshape(count, prompts, 1, -1)
        slopes = features[at] - mean_feature
        samples = prompts * SAMPLES
        return Batch(
            (rewards * problem.scales_M).reshape(count, samples, -1),
            kl.reshape(count, samples).astype(np.float64),
            slopes.reshape(count, samples, -1),
            SAMPLES,
        )


def train(
    problem: Problem,
    front: Front,
    method: Method,
    settings: Sequence[Setting],
    *,
    steps: int = STEPS,
    probe_every: int = 0,
    trace_every: int = 0,
    seed: int = 0,
) -> Outcome:
    """Train every setting on every instance.

    ``probe_every``: how often a step is held against the exact gradients. ``trace_every``: how often
    gains are kept, the start and the end included.
    """
    instances, count = problem.count, len(settings)
    options = [method.options_in(problem.regime, setting) for setting in settings]
    kl_N = np.tile([BETA * setting.kl for setting in settings], instances)
    rates_N1 = np.tile([setting.rate for setting in settings], instances)[:, None]
    told = starts(problem, method, seed)
    begins = None if told is None else [one for one in told for _ in settings]
    signal = Signal(method, options * instances, kl_N, problem.scales_M, begins, problem.dimensions)
    sampler = Sampler(problem, count, seed, method.prompts)
    adam = Adam((instances * count, problem.dimensions))
    theta_ND = np.zeros((instances * count, problem.dimensions))
    hurt, trace = [], []
    for step in range(steps):
        theta_SCD = theta_ND.reshape(instances, count, -1)
        direction_ND = signal.directions(sampler.batch(theta_SCD), adam.metric_ND)
        change_ND = adam.step(direction_ND) * rates_N1 * (1 - step / steps)
        if probe_every and step % probe_every == 0:
            hurt.append(hurts(problem, theta_SCD, change_ND.reshape(theta_SCD.shape)))
        if trace_every and step % trace_every == 0:
            trace.append(_reached(problem, front, theta_SCD)[0])
        theta_ND = theta_ND + change_ND
    gains, rewards, kl = _reached(problem, front, theta_ND.reshape(instances, count, -1))
    if trace_every:
        trace.append(gains)
    fell_PSCM = np.array(hurt) if hurt else np.full((1, *gains.shape), np.nan)
    return Outcome(gains, rewards, kl, fell_PSCM.mean(0), fell_PSCM.max(-1).mean(0), np.array(trace))


def hurts(problem: Problem, theta_SCD: Array, change_SCD: Array) -> Array:
    """1 where a change of the parameters lowers the exact J_i to first order, else 0 [S, C, M]."""
    found = []
    for c in range(theta_SCD.shape[1]):
        exact_SMD = objective_gradients(problem.gradients(theta_SCD[:, c]))
        found.append(np.einsum("smd,sd->sm", exact_SMD, change_SCD[:, c]) < 0)
    return np.stack(found, 1).astype(np.float64)


def _reached(problem: Problem, front: Front, theta_SCD: Array) -> tuple[Array, Array, Array]:
    """Gains [S, C, M], E[u] [S, C, M] and KL [S, C]."""
    settings = range(theta_SCD.shape[1])
    values = [problem.values(problem.log_probabilities(theta_SCD[:, c])) for c in settings]
    gains = np.stack([front.gains(*value) for value in values], 1)
    return gains, np.stack([value[0] for value in values], 1), np.stack([value[1] for value in values], 1)
