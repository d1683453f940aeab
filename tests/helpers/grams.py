"""Gram matrices that are hard for a minimum-norm solver, and how far a solution is from optimal."""

from __future__ import annotations

from fractions import Fraction

import torch
from torch import Tensor

Matrix = list[list[Fraction]]


def exact(gram: Tensor) -> Matrix:
    return [[Fraction(x) for x in row] for row in gram.tolist()]


def residual(gram: Tensor, weights: Tensor) -> float:
    """Largest violation of (Gw)_i = w'Gw (support) or >= (elsewhere), over the sizes of the summands.

    In rational arithmetic, so that what is measured is the solver's error alone. Weights are rounded to 53
    bits: what that leaves of a level whose summands cancel is no violation.
    """
    g = exact(gram)
    w = [Fraction(x) for x in weights.tolist()]
    total = sum(w)
    assert min(w) >= 0
    assert abs(total - 1) < Fraction(1, 10**14)
    w = [x / total for x in w]
    y = [sum((a * b for a, b in zip(row, w, strict=True)), Fraction(0)) for row in g]
    level = sum((a * b for a, b in zip(w, y, strict=True)), Fraction(0))
    summands = sum(
        (w[i] * abs(a) * b for i, row in enumerate(g) for a, b in zip(row, w, strict=True)), Fraction(0)
    )
    rounding = summands / 2**51
    worst = Fraction(0)
    for i, row in enumerate(g):
        size = sum((abs(a) * b for a, b in zip(row, w, strict=True)), abs(level))
        if size:
            violation = abs(y[i] - level) if w[i] else level - y[i]
            worst = max(worst, (violation - rounding) / size)
    return float(worst)


def families(m: int, seed: int) -> dict[str, Tensor]:
    """Rows that are hard for solvers."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator, dtype=torch.float64)

    generic = normal(m, max(2, m // 2 + seed % m))
    scales = 10 ** (8 * torch.rand(m, 1, generator=generator, dtype=torch.float64))
    line = normal(1, generic.shape[1]).expand(m, -1)
    signs = torch.sign(normal(m, 1))
    with_zero = generic.clone()
    with_zero[seed % m] = 0.0
    return {
        "generic": generic,
        "norm ratios 1e8": generic * scales,
        "near parallel": line + 1e-7 * generic,
        "parallel to rounding": line + 1e-15 * generic,
        "near parallel, norm ratios": (line + 1e-7 * generic) * scales,
        "opposing, norm ratios": signs * line * scales,
        "near opposing, norm ratios": signs * (line + 1e-6 * generic) * scales,
        "rank one": signs * line,
        "duplicated": (generic * scales)[torch.randint(m, (m,), generator=generator)],
        "denormal gram": generic * 1e-160,
        "huge gram": generic * 1e150,
        "zero row": with_zero,
    }
