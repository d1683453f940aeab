"""The operations in torch, one chunk at a time, for GPUs on which the compiled kernels do not run.

The Gram matrix is as exact (float64) and extra memory is small, but every chunk takes several passes and
launches.
"""

from __future__ import annotations

from collections.abc import Iterator

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
