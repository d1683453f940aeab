"""Kernels on a CUDA device against the reference in float64 on the CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.ops import reference

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
CHUNK = 4096  # elements per chunk of a gramian block

# fp64 sums, in some order, of products that are exact (one rounding with a weight) err by less than n * 2^-53
# of |g_i| |g_j|, and rows here are shorter than 2^20.
GRAM_TOLERANCE = 2 * 2.0 ** (20 - 53)
ROOT_TOLERANCE = 5 * 2.0**-24  # the kernel computes an inverse root in fp32, with five roundings


def normal(length: int, shift: int, dtype: torch.dtype, seed: int) -> Tensor:
    """Normal numbers on the device, starting ``shift`` elements past an aligned address."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(length + shift, generator=generator).to(dtype).cuda()[shift:]


def on_host(row: Tensor | list[Tensor]) -> Tensor:
    return row.cpu() if isinstance(row, Tensor) else torch.cat([piece.cpu() for piece in row])


def assert_gram_close(found: Tensor, rows: list, tolerance: float = GRAM_TOLERANCE, **options) -> None:
    host = [on_host(row) for row in rows]
    weight = options.pop("weight", None)
    factors = {} if weight is None else {"weight": on_host(weight)}
    expected = reference.gramian(host, **options, **factors)
    bounded = {name: value.abs() for name, value in factors.items()}
    norms = reference.gramian(host, **options, **bounded).diagonal().sqrt()
    assert found.device.type == "cuda"
    assert bool(((found.cpu() - expected).abs() <= tolerance * torch.outer(norms, norms)).all())


def combine_and_compare(out: Tensor | list, rows: list, weights: list[float], given: object) -> None:
    host = [on_host(row) for row in rows]
    expected = torch.empty(host[0].numel(), dtype=torch.float64)
    size = torch.empty_like(expected)
    reference.combine_(expected, host, weights)
    reference.combine_(size, [row.abs() for row in host], [abs(w) for w in weights])
    ops.combine_(out, rows, given)
    found = on_host(out)
    # At most 16 fp32 roundings of the summands, then one to the output's type.
    last = torch.finfo(found.dtype)
    allowed = size * 17 * 2.0**-24 + expected.abs() * last.eps + last.smallest_normal * last.eps
    assert bool(((found.double() - expected).abs() <= allowed).all())


def solve(gram: Tensor, exclude_zero: bool = False) -> tuple[Tensor, int]:
    weights = torch.full((gram.shape[0],), 7.0, dtype=torch.float64, device="cuda")
    status = torch.full((1,), 7, dtype=torch.int32, device="cuda")
    ops.min_norm_(weights, status, gram.cuda(), exclude_zero=exclude_zero)
    return weights.cpu(), int(status.item())
