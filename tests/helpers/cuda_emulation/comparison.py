"""Emulated kernels against the reference in float64."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega.ops import reference

# fp64 throughout: kernel and reference round at most once an element, to 2^-53, and no test has more
# than 2^16 elements.
GRAM_TOLERANCE = 2.0**-36


def normal(length: int, dtype: torch.dtype, seed: int) -> Tensor:
    return torch.randn(length, generator=torch.Generator().manual_seed(seed)).to(dtype)


def assert_gram_close(
    found: Tensor, rows: list[list[Tensor]], tolerance: float = GRAM_TOLERANCE, **options
) -> None:
    joined = [torch.cat(row) for row in rows]
    weight = options.pop("weight", None)
    factors = {} if weight is None else {"weight": torch.cat(weight)}
    expected = reference.gramian(joined, **options, **factors)
    bounded = {name: value.abs() for name, value in factors.items()}
    norms = reference.gramian(joined, **options, **bounded).diagonal().sqrt()
    assert bool(((found - expected).abs() <= tolerance * torch.outer(norms, norms)).all())


def combine_and_compare(emulated, out: list[Tensor], rows: list[list[Tensor]], weights: list[float]) -> None:
    joined = [torch.cat(row) for row in rows]
    expected = torch.empty(joined[0].numel(), dtype=torch.float64)
    size = torch.empty_like(expected)
    reference.combine_(expected, joined, weights)
    reference.combine_(size, [row.abs() for row in joined], [abs(w) for w in weights])
    emulated.combine(out, rows, weights)
    found = torch.cat(out)
    # At most 16 fp32 roundings of the summands and one of the weight, then one to the output's type.
    last = torch.finfo(found.dtype)
    allowed = size * 17 * 2.0**-24 + expected.abs() * last.eps + last.smallest_normal * last.eps
    assert bool(((found.double() - expected).abs() <= allowed).all())
