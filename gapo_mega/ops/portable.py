"""The operations in torch, one chunk at a time, for GPUs on which the compiled kernels do not run.

The Gram matrix is as exact (float64) and extra memory is small, but every chunk takes several passes and
launches. ``accumulate`` has no compiled kernel for GPUs, whose libraries have what it needs.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gapo_mega.ops.arguments import Pieces, Weight

# Elements per chunk: 32 MiB per row in float64.
STRETCH = 1 << 22


def gramian(rows: Pieces, segments: npt.NDArray[np.int64] | None, weight: Weight, out: Tensor) -> None:
    """Add the Gram matrix of checked rows to ``out``, float64 ``[m, m]`` on the same device."""
    for piece, start, end in _stretches(rows, segments):
        block = torch.stack([row[piece][start:end].double() for row in rows.pieces])
        scaled = block * weight.factors(piece, start, end) if weight.pieces else block
        out += scaled @ block.T


def combine(out: Pieces, rows: Pieces, weights: Tensor) -> None:
    """Write ``sum_i weights[i] rows[i]`` to ``out``, without reading rows of weight zero."""
    used = [i for i, w in enumerate(weights.tolist()) if w != 0]
    for piece, start, end in _stretches(rows, None):
        total = torch.zeros(end - start, dtype=torch.float32, device=rows.device)
        for i in used:
            total += weights[i].float() * rows.pieces[i][piece][start:end].float()
        out.pieces[0][piece][start:end].copy_(total)


def accumulate(rows: Sequence[Tensor], coefficients: Tensor, terms: Tensor, overwrite: bool) -> None:
    """Add ``coefficients @ terms`` to checked rows, which are vectors and matrices."""
    beta = 0.0 if overwrite else 1.0
    summands = terms.float()
    start = 0
    for row in rows:
        if row.dim() == 1:
            torch.addmv(row, summands.t(), coefficients[start], beta=beta, out=row)
            start += 1
        elif len(row):
            torch.addmm(row, coefficients[start : start + len(row)], summands, beta=beta, out=row)
            start += len(row)


def _stretches(rows: Pieces, segments: npt.NDArray[np.int64] | None) -> Iterator[tuple[int, int, int]]:
    """(piece, start, end) of chunks of at most STRETCH elements that cover the positions that count."""
    ranges = [[0, rows.total]] if segments is None else segments.tolist()
    offset = 0
    for piece, length in enumerate(rows.lengths):
        for first, last in ranges:
            low, high = max(first - offset, 0), min(last - offset, length)
            for start in range(low, high, STRETCH):
                yield piece, start, min(start + STRETCH, high)
        offset += length
