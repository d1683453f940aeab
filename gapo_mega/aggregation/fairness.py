"""The weights of alpha-fair directions, by Newton's method on a convex function."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapo_mega.aggregation.canonical import Problem
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.ops import Status

# Added to the cosines' diagonal. Without it there is no solution where no direction raises all objectives:
# the weights would grow without bound. With it the direction goes to 0 there.
_RIDGE = 2.0**-40
_MOST_STEPS = 500
# Of the summands of an equation. Newton's last steps double the digits, so that this is reached at once.
_ROUNDING = 1e-14


def alpha_fair(problem: Problem, alpha: float) -> Solution:
    """``w > 0`` with ``(G w)_i = (w_i / (K u_i))^(-1 / alpha)``, u the numbers of the problem.

    That is where ``d = G w`` maximises the alpha-fair utility ``sum_i u_i <d, g_i>^(1 - alpha) / (1 -
    alpha)`` (alpha = 1: ``sum_i u_i log <d, g_i>``) over directions of its length.
    """
    # With w_i = b_i / ||g_i||: (C b)_i = k_i b_i^(-1/alpha), the stationary point of a strictly convex
    # function.
    log_k = (1 / alpha - 1) * problem.norms.log() + (len(problem.norms) * problem.numbers).log() / alpha
    # In units in which the largest k is 1, b is 2^(shift) times larger.
    shift = float(log_k.max()) * alpha / (1 + alpha)
    lengths = _newton(problem.cosines, (log_k - log_k.max()).exp(), 1 / alpha)
    # A factor f of all gradients is one of f^(-2 alpha / (1 + alpha)) of all weights.
    units = -2 * alpha / (1 + alpha) * problem.exponent * math.log(2)
    if lengths is None:
        return Solution(torch.zeros_like(log_k), status=Status.NOT_CONVERGED)
    return Solution(lengths / problem.norms, shift + units)


def _newton(cosines: Tensor, k: Tensor, power: float) -> Tensor | None:
    """``b > 0`` with ``(cosines + ridge) b = k b^(-power)``; None where numbers leave their range."""
    matrix = cosines + _RIDGE * torch.eye(len(k), dtype=torch.float64)
    found = k ** (1 / (1 + power))  # the solution for orthogonal gradients
    for _ in range(_MOST_STEPS):
        pull = k * found**-power
        # In logarithms of b the equations have the same scale in all places.
        slope = found * (matrix @ found - pull)
        curvature = matrix * found[:, None] * found[None, :] + torch.diag(power * pull * found)
        if not bool(curvature.isfinite().all()):
            return None
        if bool((slope.abs() <= _ROUNDING * found * (matrix.abs() @ found)).all()):
            return found
        factor = torch.linalg.cholesky_ex(curvature)[0]
        step = -torch.cholesky_solve(slope[:, None], factor)[:, 0]
        # Relative steps below -0.9 would leave the positive numbers or come too near to their end.
        step = step / max(1.0, float(-step.min()) / 0.9)
        rate = _descend(matrix, k, power, found, step, -float(slope @ step))
        if rate == 0.0:  # rounding is all that is left to gain
            return found
        found = found * (1 + rate * step)
    return None


def _descend(matrix: Tensor, k: Tensor, power: float, start: Tensor, step: Tensor, gain: float) -> float:
    """The share of ``step`` (relative to ``start``) that lowers the function as Armijo asks, or 0."""

    def change(rate: float) -> float:
        move = rate * step
        shift = start * move
        square = shift @ (matrix @ (start + 0.5 * shift))
        if power == 1.0:
            potential = k * torch.log1p(move)
        else:
            potential = k * start ** (1 - power) * torch.expm1((1 - power) * torch.log1p(move)) / (1 - power)
        return float(square - potential.sum())

    rate = 1.0
    while rate > 2.0**-40:
        if change(rate) <= -1e-4 * rate * gain:
            return rate
        rate /= 2
    return 0.0
