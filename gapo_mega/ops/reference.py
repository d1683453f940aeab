"""The operations in plain torch and float64, slow and short: the tests compare the kernels with them."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import torch
from torch import Tensor

from gapo_mega.ops.arguments import InverseRoot, Row, Segments


def _flat(row: Row) -> Tensor:
    return row if isinstance(row, Tensor) else torch.cat(list(row))


def _factors(weight: Row | InverseRoot) -> Tensor:
    if not isinstance(weight, InverseRoot):
        return _flat(weight).double()
    values = _flat(weight.values).double()
    roots = 1.0 / ((values / weight.correction).sqrt() + weight.eps)
    return torch.where(values <= 0, 0.0, roots)


def gramian(
    rows: Sequence[Row],
    *,
    segments: Segments | None = None,
    weight: Row | InverseRoot | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """:func:`gapo_mega.ops.gramian` for flat pieces, as one float64 matrix product."""
    matrix = torch.stack([_flat(row).double() for row in rows])
    factors = torch.ones_like(matrix[0]) if weight is None else _factors(weight)
    if segments is not None:
        counted = torch.zeros_like(factors)
        for start, end in segments:
            counted[int(start) : int(end)] = 1.0
        factors = factors * counted
    gram = (matrix * factors) @ matrix.T
    return gram if out is None else out.add_(gram)


def combine_(out: Row, rows: Sequence[Row], weights: Tensor | Sequence[float]) -> Row:
    """:func:`gapo_mega.ops.combine_` for flat pieces, summed in float64."""
    factors = torch.as_tensor(weights, dtype=torch.float64)
    used = [i for i in range(len(rows)) if factors[i] != 0]
    total = sum((factors[i] * _flat(rows[i]).double() for i in used), torch.zeros(()).double())
    total = total.expand(_flat(out).shape)
    position = 0
    for piece in [out] if isinstance(out, Tensor) else out:
        piece.copy_(total[position : position + piece.numel()])
        position += piece.numel()
    return out


def min_norm(gram: Tensor) -> Tensor:
    """:func:`gapo_mega.ops.min_norm` for well-conditioned matrices, by trying every support set."""
    gram = gram.double()
    m = gram.shape[0]
    supports = [set(support) for size in range(1, m + 1) for support in combinations(range(m), size)]
    solved = [(support, _affine_minimiser(gram, sorted(support))) for support in supports]
    solved = [(support, weights) for support, weights in solved if bool((weights[sorted(support)] > 0).all())]
    least = min(float(weights @ gram @ weights) for _, weights in solved)
    corners: list[tuple[set[int], Tensor]] = []
    for support, weights in solved:  # smaller ones first
        rounding = 1e-12 * float(weights @ gram.abs() @ weights)
        best = float(weights @ gram @ weights) - least <= rounding
        if best and not any(smaller <= support for smaller, _ in corners):
            corners.append((support, weights))
    return torch.stack([weights for _, weights in corners]).mean(dim=0)


def _affine_minimiser(gram: Tensor, support: list[int]) -> Tensor:
    """Minimiser of w'Gw with sum 1 and any signs on a support set, by its bordered system."""
    n = len(support)
    system = torch.zeros(n + 1, n + 1).double()
    system[:n, :n] = gram[support][:, support]
    system[:n, n] = -1.0
    system[n, :n] = 1.0
    right = torch.zeros(n + 1).double()
    right[n] = 1.0
    weights = torch.zeros(gram.shape[0]).double()
    weights[support] = (torch.linalg.pinv(system) @ right)[:n]
    return weights
