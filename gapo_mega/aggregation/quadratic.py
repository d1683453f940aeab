"""The exact solution of the small quadratic programs of which projections onto a dual cone consist."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_EPS = float(np.finfo(np.float64).eps)
Array = NDArray[np.float64]
Mask = NDArray[np.bool_]


def increments(cosines: Tensor, bounds: Tensor) -> Tensor:
    """``t >= 0`` that minimises ``||sum_i (bounds_i + t_i) u_i||`` for K unit vectors u, float64 [K].

    ``cosines`` [K, K] is their Gram matrix, which may be singular. ``d = sum_i (bounds_i + t_i) u_i`` is then
    the projection of ``sum_i bounds_i u_i`` onto the dual cone ``{d: <d, u_i> >= 0 for all i}``. It is
    unique; where several ``t`` give it, this is one of them.

    Non-negative least squares by the active-set method of Lawson and Hanson (Solving Least Squares Problems,
    1974, chapter 23), in at most as many steps as there are supports, and in practice in some K: no iteration
    to a tolerance. It works on a factor of ``cosines``, which keeps the digits that normal equations lose.
    """
    start = bounds.numpy()
    eigenvalues, vectors = np.linalg.eigh(cosines.numpy())
    factor = (vectors * np.sqrt(np.maximum(eigenvalues, 0.0))).T  # columns are the u_i in K dimensions
    return torch.from_numpy(_least_squares(factor, -factor @ start, float(np.abs(start).sum())))


def _least_squares(factor: Array, target: Array, size: float) -> Array:
    """``t >= 0`` that minimises ``||factor t - target||``; columns have length 1, target at most ``size``."""
    count = factor.shape[1]
    found = np.zeros(count)
    free = np.zeros(count, dtype=bool)
    distance = np.inf
    while True:
        residual = target - factor @ found
        reached = float(residual @ residual)
        if not reached < distance:  # rounding is all that is left to gain
            return found
        distance = reached
        gain = np.where(free, 0.0, factor.T @ residual)
        rounding = 8 * count * _EPS * (size + found.sum())
        following = _enter(factor, target, found, free, gain, rounding)
        if following is None:
            return found
        found, free = following, following > 0


def _enter(
    factor: Array, target: Array, found: Array, free: Mask, gain: Array, rounding: float
) -> Array | None:
    """The solution with one more free variable and those dropped that become 0; None where none may enter."""
    for index in np.argsort(-gain, kind="stable"):
        if gain[index] <= rounding:
            return None
        support = free.copy()
        support[index] = True
        best = _on_support(factor, target, support)
        # A column that depends on the others, up to rounding, has a gain and yet no way to go.
        if best[index] > 0:
            return _inside(factor, target, found, support, best)
    return None


def _inside(factor: Array, target: Array, start: Array, support: Mask, best: Array) -> Array:
    """Go from ``start`` to the best on ``support``; what would become negative on the way leaves it."""
    found = start.copy()
    while bool((best[support] <= 0).any()):
        leaving = support & (best <= 0)
        step = float(np.min(found[leaving] / (found[leaving] - best[leaving])))
        found = np.where(support, found + step * (best - found), 0.0)
        found[leaving & (found <= _EPS * np.abs(best))] = 0.0
        support = support & (found > 0)
        best = _on_support(factor, target, support)
    return best


def _on_support(factor: Array, target: Array, support: Mask) -> Array:
    """Least squares without signs, 0 off ``support``."""
    solution = np.zeros(len(support))
    if support.any():
        solution[support] = np.linalg.lstsq(factor[:, support], target, rcond=None)[0]
    return solution
