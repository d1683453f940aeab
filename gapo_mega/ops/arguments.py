"""What the operations accept: rows, segments, weights. Checked here, before any address is taken."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gapo_mega.ops import _native

# One row: a flat tensor, or its pieces in order.
Row = Tensor | Sequence[Tensor]
Segments = Sequence[tuple[int, int]] | Tensor | npt.NDArray[np.int64]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/api.h


@dataclass(frozen=True)
class InverseRoot:
    """The factors ``1 / (sqrt(values / correction) + eps)``; 0 where a value is 0 or below, NaN stays NaN.

    With Adam's second moment and its bias correction ``1 - beta2^t`` that is the diagonal of Adam's
    metric, formed where it is used.
    """

    values: Row  # float32, one a position
    correction: float = 1.0
    eps: float = 0.0


@dataclass(frozen=True)
class Weight:
    """Checked factors of positions: float32 pieces, none where every position counts once."""

    pieces: list[Tensor]
    inverse_root: tuple[float, float] | None = None  # scale and eps of 1 / (sqrt(value) scale + eps)

    @property
    def addresses(self) -> list[int]:
        return [piece.data_ptr() for piece in self.pieces]

    def factors(self, piece: int, start: int, end: int) -> Tensor:
        """Of positions ``[start, end)`` of a piece, by torch, in fp64."""
        values = self.pieces[piece][start:end].double()
        if self.inverse_root is None:
            return values
        scale, eps = self.inverse_root
        return torch.where(values <= 0, 0.0, 1.0 / (values.sqrt() * scale + eps))


@dataclass(frozen=True)
class Pieces:
    """Checked rows: ``pieces[i][p]`` is piece p of row i, flat and contiguous."""

    pieces: list[list[Tensor]]
    lengths: list[int]
    dtypes: list[torch.dtype]  # one a row
    device: torch.device

    @property
    def count(self) -> int:
        return len(self.pieces)

    @property
    def total(self) -> int:
        return sum(self.lengths)

    @property
    def addresses(self) -> list[int]:
        return [piece.data_ptr() for row in self.pieces for piece in row]

    @property
    def dtype_codes(self) -> list[int]:
        return [DTYPE_CODES[dtype] for dtype in self.dtypes]


def _split(name: str, row: Row) -> list[Tensor]:
    pieces = [row] if isinstance(row, Tensor) else list(row)
    for index, piece in enumerate(pieces):
        where = name if isinstance(row, Tensor) else f"{name}[{index}]"
        if not isinstance(piece, Tensor):
            raise ValueError(f"{where}: found {type(piece).__name__}, accepted: torch.Tensor")
        if piece.dim() != 1 or not piece.is_contiguous():
            raise ValueError(
                f"{where}: found shape {tuple(piece.shape)} with strides {piece.stride()}, "
                "accepted: a flat contiguous tensor"
            )
    return pieces


def parse_rows(name: str, rows: Sequence[Row]) -> Pieces:
    """Rows of equal piece lengths on one device, each of one element type.

    Raises:
        ValueError: no rows or more than 16, or rows that differ, or an unsupported type or device.
    """
    split = [_split(f"{name}[{i}]", row) for i, row in enumerate(rows)]
    if not 1 <= len(split) <= _native.max_rows:
        raise ValueError(f"{name}: found {len(split)} rows, accepted: 1 to {_native.max_rows}")
    lengths = [piece.numel() for piece in split[0]]
    for i, row in enumerate(split):
        found = [piece.numel() for piece in row]
        if found != lengths:
            raise ValueError(
                f"{name}[{i}]: found pieces of lengths {found}, accepted: {lengths} as {name}[0]"
            )
    dtypes = [_dtype(f"{name}[{i}]", row) for i, row in enumerate(split)]
    devices = {piece.device for row in split for piece in row} or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"{name}: found devices {sorted(map(str, devices))}, accepted: one CPU or CUDA device"
        )
    return Pieces(split, lengths, dtypes, devices.pop())


def _dtype(name: str, row: list[Tensor]) -> torch.dtype:
    """The element type of a row's pieces."""
    found = {piece.dtype for piece in row} or {torch.float32}
    if len(found) > 1 or next(iter(found)) not in DTYPE_CODES:
        raise ValueError(
            f"{name}: found element types {sorted(map(str, found))}, "
            "accepted: one of float32, bfloat16, float16"
        )
    return found.pop()


def parse_segments(segments: Segments | None, total: int) -> npt.NDArray[np.int64] | None:
    """``[start, end)`` pairs as int64 ``[S, 2]``, sorted and disjoint within ``[0, total)``; None stays None.

    Thousands of segments are an ordinary case: they are checked all at once.
    """
    if segments is None:
        return None
    pairs = segments.cpu().numpy() if isinstance(segments, Tensor) else np.asarray(segments)
    if pairs.size == 0:
        return np.empty((0, 2), dtype=np.int64)
    if pairs.ndim != 2 or pairs.shape[1] != 2 or not np.issubdtype(pairs.dtype, np.integer):
        raise ValueError(
            f"segments: found {pairs.dtype} of shape {pairs.shape}, accepted: pairs of whole numbers [S, 2]"
        )
    pairs = np.ascontiguousarray(pairs, dtype=np.int64)
    start, end = pairs[:, 0], pairs[:, 1]
    before = np.concatenate([[0], end[:-1]])
    wrong = np.flatnonzero((start < before) | (end < start) | (end > total))
    if wrong.size:
        i = int(wrong[0])
        raise ValueError(
            f"segments[{i}]: found [{start[i]}, {end[i]}), accepted: sorted, disjoint ranges within "
            f"[0, {total}); the one before ends at {before[i]}"
        )
    return pairs


def parse_weight(weight: Row | InverseRoot | None, rows: Pieces) -> Weight:
    """The diagonal weight, one fp32 value an element."""
    if weight is None:
        return Weight([])
    pieces = _split("weight", weight.values if isinstance(weight, InverseRoot) else weight)
    lengths = [piece.numel() for piece in pieces]
    if lengths != rows.lengths:
        raise ValueError(f"weight: found pieces of lengths {lengths}, accepted: {rows.lengths} as the rows")
    for piece in pieces:
        if piece.dtype != torch.float32 or piece.device != rows.device:
            raise ValueError(
                f"weight: found {piece.dtype} on {piece.device}, accepted: torch.float32 on {rows.device}"
            )
    if not isinstance(weight, InverseRoot):
        return Weight(pieces)
    limits = torch.finfo(torch.float32)  # what the kernels compute with
    if not (limits.tiny <= weight.correction <= limits.max and 0 <= weight.eps <= limits.max):
        raise ValueError(
            f"weight: found the correction {weight.correction} and eps {weight.eps}, accepted: a correction "
            "above 0 and an eps of at least 0, finite in fp32"
        )
    return Weight(pieces, (1.0 / math.sqrt(weight.correction), weight.eps))


def check_matrix(name: str, matrix: Tensor, device: torch.device) -> int:
    """The side m of a contiguous float64 ``[m, m]`` matrix on ``device``."""
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] and matrix.is_contiguous()
    if not square or matrix.dtype != torch.float64 or matrix.device != device:
        raise ValueError(
            f"{name}: found {matrix.dtype} of shape {tuple(matrix.shape)} on {matrix.device}, accepted: "
            f"contiguous torch.float64 [m, m] on {device}"
        )
    return int(matrix.shape[0])


def _extent(piece: Tensor) -> tuple[int, int]:
    begin = piece.data_ptr()
    return begin, begin + piece.numel() * piece.element_size()


def parse_out(out: Row, rows: Pieces) -> Pieces:
    """The output's pieces: shaped like a row, of any accepted type, apart from all rows or one of them.

    Raises:
        ValueError: another shape or device, or memory shared with a row other than exactly.
    """
    parsed = parse_rows("out", [out])
    if parsed.lengths != rows.lengths or (parsed.device != rows.device and rows.lengths):
        raise ValueError(
            f"out: found pieces of lengths {parsed.lengths} on {parsed.device}, accepted: "
            f"{rows.lengths} on {rows.device} as the rows"
        )
    targets = sorted((*_extent(piece), p) for p, piece in enumerate(parsed.pieces[0]) if piece.numel())
    for (_, end, p), (begin, _, q) in pairwise(targets):
        if begin < end:
            raise ValueError(f"out: pieces {p} and {q} overlap, accepted: disjoint pieces")
    for i, row in enumerate(rows.pieces):
        for p, piece in enumerate(row):
            _refuse_overlap(f"rows[{i}]", p, piece, targets, parsed.dtypes[0])
    return parsed


def _refuse_overlap(
    name: str, index: int, piece: Tensor, targets: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    """``targets``: extent and index of the output's pieces, sorted and disjoint."""
    begin, end = _extent(piece)
    first = bisect_right(targets, begin, key=lambda target: target[1])
    if begin == end or first == len(targets) or targets[first][0] >= end:
        return
    target_begin, target_end, target_index = targets[first]
    if (begin, end, index) != (target_begin, target_end, target_index) or piece.dtype != dtype:
        raise ValueError(
            f"out: piece {target_index} overlaps piece {index} of {name}, accepted: memory of its own, "
            "or exactly one of the rows"
        )
