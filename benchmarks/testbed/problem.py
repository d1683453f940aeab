"""Instances of a regime: a log-linear policy over a finite set, whose values and gradients are exact sums.

Of context x (X of them, equally likely) the policy answers y (Y of them) with probability

    pi_theta(y | x) proportional to pi_0(y | x) exp(theta' phi(x, y)),

and objective i is worth ``J_i = E[u_i] - beta KL(pi_theta || pi_0)``, ``u_i`` the reward with mean 0 in every
context and spread 1 over all of them under pi_0. The u_i lie in the span of phi, so that no policy whatever
beats the best theta. Arrays have the suffixes S (instances), C (policies of an instance), D (parameters).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.testbed.regimes import Kind, Regime

Array = NDArray[np.float64]
Single = NDArray[np.float32]

CONTEXTS, RESPONSES, DIMENSIONS = 50, 200, 64
BETA = 0.5
_RARE = 2.05  # latent rewards above it: 2 % of a normal distribution
_SHARED = 0.5  # of a latent reward's variance: the same in all contexts, so that gradients generalise


class Problem:
    """One instance of ``regime`` for every seed, all of the same shape, computed at once.

    Attributes:
        features_SXYD, rewards_SXYM, log_start_SXY: phi, u and log pi_0, float32.
    """

    def __init__(self, regime: Regime, seeds: Sequence[int], dimensions: int = DIMENSIONS) -> None:
        self.regime, self.seeds = regime, tuple(seeds)
        made = [_instance(regime, seed, dimensions) for seed in seeds]
        self.features_SXYD: Single = np.stack([one[0] for one in made]).astype(np.float32)
        self.rewards_SXYM: Single = np.stack([one[1] for one in made]).astype(np.float32)
        self.log_start_SXY: Single = np.stack([one[2] for one in made]).astype(np.float32)
        self.scales_M = np.array(regime.scales, dtype=np.float64)

    @property
    def count(self) -> int:
        """Instances S."""
        return len(self.seeds)

    @property
    def dimensions(self) -> int:
        """Parameters D of a policy."""
        return int(self.features_SXYD.shape[-1])

    def log_probabilities(self, theta_SD: Array) -> Array:
        """log pi_theta [S, X, Y]."""
        shape = self.log_start_SXY.shape
        features = self.features_SXYD.reshape(self.count, -1, self.dimensions)
        shift = np.matmul(features, theta_SD.astype(np.float32)[..., None]).reshape(shape)
        return normalized(self.log_start_SXY + shift)

    def values(self, log_pi_SXY: Array) -> tuple[Array, Array]:
        """E[u_i] [S, M] and KL(pi || pi_0) [S] of policies given by their log-probabilities."""
        pi_SXY = np.exp(log_pi_SXY)
        rewards_SM = np.einsum("sxy,sxyi->si", pi_SXY, self.rewards_SXYM) / CONTEXTS
        kl_S = (pi_SXY * (log_pi_SXY - self.log_start_SXY)).sum((1, 2)) / CONTEXTS
        return rewards_SM, kl_S

    def gradients(self, theta_SD: Array) -> Array:
        """Exact gradients of E[u_1], ..., E[u_M] and of the KL with respect to theta [S, M + 1, D]."""
        log_pi_SXY = self.log_probabilities(theta_SD)
        pi_SXY = np.exp(log_pi_SXY)
        signal = np.concatenate([self.rewards_SXYM, (log_pi_SXY - self.log_start_SXY)[..., None]], -1)
        signal = signal - np.einsum("sxy,sxyi->sxi", pi_SXY, signal)[:, :, None]
        weighted = (pi_SXY[..., None] * signal).reshape(self.count, -1, signal.shape[-1])
        features = self.features_SXYD.reshape(self.count, -1, self.dimensions)
        found: Array = np.matmul(weighted.swapaxes(1, 2), features) / CONTEXTS
        return found


def objective_gradients(gradients: Array, beta: float = BETA) -> Array:
    """Gradients of the J_i [..., M, D] from those of ``Problem.gradients`` [..., M + 1, D]."""
    found: Array = gradients[..., :-1, :] - beta * gradients[..., -1:, :]
    return found


def drawn(cumulative_NBY: Array, drawn_NBG: Array) -> Any:
    """The responses at which cumulative probabilities pass the drawn numbers [N, B, G]."""
    count, prompts, responses = cumulative_NBY.shape
    offset = np.arange(count * prompts).reshape(count, prompts, 1)
    wanted = (drawn_NBG * (1 - 1e-9) + offset).ravel()
    places = np.searchsorted((cumulative_NBY + offset).ravel(), wanted).reshape(drawn_NBG.shape)
    return np.clip(places - offset * responses, 0, responses - 1)


def normalized(logits: NDArray[np.floating]) -> Array:
    """Log-probabilities over the last axis."""
    logits = logits - logits.max(-1, keepdims=True)
    found: Array = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
    return found


def _instance(regime: Regime, seed: int, dimensions: int) -> tuple[Array, Array, Array]:
    """phi [X, Y, D], u [X, Y, M], log pi_0 [X, Y]."""
    count = regime.count
    random = np.random.default_rng(10_000 + seed)
    log_start = normalized(0.5 * random.standard_normal((CONTEXTS, RESPONSES)))
    start = np.exp(log_start)
    mixing = np.linalg.cholesky(regime.correlations() + 1e-9 * np.eye(count))
    shared = np.sqrt(_SHARED) * random.standard_normal((1, RESPONSES, count))
    own = np.sqrt(1 - _SHARED) * random.standard_normal((CONTEXTS, RESPONSES, count))
    latent = (shared + own) @ mixing.T
    rewards = np.stack([_shaped(latent[..., i], kind) for i, kind in enumerate(regime.kinds)], -1)
    others = random.standard_normal((CONTEXTS, RESPONSES, dimensions - count))
    features = _centred(np.concatenate([rewards, others], -1), start)
    rewards = _centred(rewards, start)
    rewards = rewards / np.sqrt(np.einsum("xy,xyi->i", start, rewards**2) / CONTEXTS)
    # White under pi_0, then stretched: directions of the parameters differ in steepness, as a network's do.
    covariance = np.einsum("xy,xyk,xyl->kl", start, features, features) / CONTEXTS
    white = features @ np.linalg.inv(np.linalg.cholesky(covariance)).T
    first, second = (np.linalg.qr(random.standard_normal((dimensions, dimensions)))[0] for _ in range(2))
    stretched = (white @ first * np.arange(1, dimensions + 1) ** -0.5) @ second
    return stretched, rewards, log_start


def _centred(values_XYK: Array, start_XY: Array) -> Array:
    """Mean 0 under pi_0 in every context."""
    found: Array = values_XYK - np.einsum("xy,xyk->xk", start_XY, values_XYK)[:, None]
    return found


def _shaped(latent: Array, kind: Kind) -> Array:
    if kind == "dense":
        return latent
    if kind == "rare":
        return (latent > _RARE).astype(np.float64)
    if kind == "heavy":
        return np.minimum(np.exp(1.2 * latent), 30.0)
    return np.minimum(latent + 1.5, 0.0)
