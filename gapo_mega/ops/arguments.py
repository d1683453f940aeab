"""Checks of the operations' arguments (rows, segments, weights), before anything takes an address."""

from __future__ import annotations

import math
from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gapo_mega.ops import _native
from gapo_mega.ops.in_place import extent, require_constant, require_writable

# One row: a tensor, or its pieces in order, of any shape.
Row = Tensor | Sequence[Tensor]
# A row that is only read: a piece may be None, as from torch.autograd.grad, and counts as zeros.
Gradient = Tensor | Sequence[Tensor | None]
# A piece's dimensions from the slowest to the fastest in memory; None if that is their own order.
Order = tuple[int, ...]
Segments = Sequence[tuple[int, int]] | Tensor | npt.NDArray[np.int64]

DTYPE_CODES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}  # DType in csrc/api.h


@dataclass(frozen=True)
class InverseRoot:
    """The factors ``1 / (sqrt(values / correction) + eps)``; 0 where a value is 0 or below, NaN stays NaN.

    With Adam's second moment and its bias correction ``1 - beta2^t`` this is the diagonal of Adam's metric.
    The kernels compute the factors as they use them.
    """

    values: Row  # float32, one per position
    correction: float = 1.0
    eps: float = 0.0


@dataclass(frozen=True)
class Weight:
    """Checked factors of positions, as float32 pieces; no pieces if every position counts once."""

    pieces: list[Tensor]
    inverse_root: tuple[float, float] | None = None  # scale and eps of 1 / (sqrt(value) scale + eps)

    @property
    def addresses(self) -> list[int]:
        return [piece.data_ptr() for piece in self.pieces]

    def factors(self, piece: int, start: int, end: int) -> Tensor:
        """The factors of positions ``[start, end)`` of a piece, by torch, in fp64."""
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
    dtypes: list[torch.dtype]  # one per row
    device: torch.device
    forms: list[_Form]  # one per piece: how to view the caller's tensors as flat

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

    def require_own_order(self, option: str) -> None:
        """Raise ``ValueError`` if a piece's positions in memory are not its elements in their own order."""
        for p, form in enumerate(self.forms):
            if form.order is not None:
                raise ValueError(
                    f"{option}: given with rows whose piece {p} of shape {tuple(form.shape or ())} is not "
                    "contiguous, accepted: contiguous pieces (contiguous() makes them so)"
                )

    def flat(self, name: str, row: Row) -> list[Tensor]:
        """The flat pieces of another tensor or list with the rows' lengths, in the rows' memory order.

        Raises ``ValueError`` if the shapes differ or there is no view in that order.
        """
        found = [form.flat(*piece) for form, piece in zip(self.forms, _split(name, row), strict=True)]
        assert [piece.numel() for piece in found] == self.lengths, "the caller compares the lengths"
        return found


def _split(name: str, row: Row) -> list[tuple[str, Tensor]]:
    """The pieces of a row, each with its name for errors."""
    named: list[tuple[str, Tensor]] = []
    for where, piece in _split_gradient(name, row):
        if piece is None:
            raise ValueError(f"{where}: found None, accepted: torch.Tensor")
        named.append((where, piece))
    return named


def pieces_of(name: str, row: Row) -> list[Tensor]:
    """The pieces of a row as they were given."""
    return [piece for _, piece in _split(name, row)]


def _split_gradient(name: str, row: Gradient) -> list[tuple[str, Tensor | None]]:
    """``_split`` for a row whose pieces may be None."""
    if isinstance(row, Tensor):
        named: list[tuple[str, Tensor | None]] = [(name, row)]
    else:
        named = [(f"{name}[{index}]", piece) for index, piece in enumerate(row)]
    for where, piece in named:
        if piece is not None:
            require_memory(where, piece)
    return named


def require_memory(name: str, tensor: object) -> None:
    """Raise ``ValueError`` for what is no tensor whose elements lie in memory as they are."""
    if not isinstance(tensor, Tensor):
        raise ValueError(f"{name}: found {type(tensor).__name__}, accepted: torch.Tensor")
    if tensor.layout != torch.strided:
        raise ValueError(f"{name}: found the layout {tensor.layout}, accepted: a dense tensor")
    if tensor.is_neg():
        raise ValueError(
            f"{name}: found a view that negates its memory, accepted: an ordinary tensor "
            "(resolve_neg() makes one)"
        )
    if tensor._is_zerotensor():
        raise ValueError(
            f"{name}: found zeros without memory, accepted: an ordinary tensor (clone() makes one)"
        )


@dataclass(frozen=True)
class _Form:
    """How to read one piece of all rows as flat memory, with the same elements side by side."""

    shape: torch.Size | None = None  # None: flat in all rows, so it matches any shape of this length
    order: Order | None = None

    def flat(self, name: str, piece: Tensor) -> Tensor:
        """A flat view of ``piece``, whose dimensions must have the rows' memory order."""
        contiguous = self.order is None and piece.is_contiguous()
        if contiguous and piece.dim() == 1:
            return piece
        if self.shape is not None and piece.shape != self.shape and (self.order or piece.dim() > 1):
            raise ValueError(
                f"{name}: found shape {tuple(piece.shape)}, accepted: {tuple(self.shape)} as in the rows"
            )
        ordered = piece.permute(self.order) if self.order else piece
        if not contiguous and not ordered.is_contiguous():
            accepted = "the memory order that the rows have" if self.order else "a contiguous tensor"
            raise ValueError(
                f"{name}: found shape {tuple(piece.shape)} with strides {piece.stride()}, accepted: "
                f"{accepted} (contiguous() copies a tensor into its own order)"
            )
        return ordered.view(-1)


_FLAT = _Form()


def _form(pieces: Sequence[Tensor]) -> _Form:
    """The form of one piece of all rows; ``_Form.flat`` later refuses a tensor without that form."""
    shaped = [piece.shape for piece in pieces if piece.dim() != 1]
    if not shaped:
        return _FLAT
    strange = [piece for piece in pieces if not piece.is_contiguous()]
    if not strange or len(strange) < len(pieces):
        return _Form(shaped[0])
    strides = strange[0].stride()
    order = tuple(sorted(range(len(strides)), key=lambda dimension: -strides[dimension]))
    return _Form(shaped[0], order if strange[0].permute(order).is_contiguous() else None)


def parse_rows(name: str, rows: Sequence[Gradient]) -> Pieces:
    """Check rows: equal piece lengths, one device, one dtype per row; None counts as zeros.

    Raises:
        ValueError: no rows or more than 16, rows that differ, an unsupported dtype or device, or a piece
            without a flat view.
    """
    named = [_split_gradient(f"{name}[{i}]", row) for i, row in enumerate(rows)]
    if not 1 <= len(named) <= _native.max_rows:
        raise ValueError(f"{name}: found {len(named)} rows, accepted: 1 to {_native.max_rows}")
    given = [_given(name, named, p) for p in range(len(named[0]))]
    lengths = [pieces[0][1].numel() for pieces in given]
    for i, row in enumerate(named):
        _check_lengths(f"{name}[{i}]", row, lengths, f"{name}[0]")
    dtypes = [_dtype(f"{name}[{i}]", [piece for _, piece in row]) for i, row in enumerate(named)]
    device = _device(name, {piece.device for pieces in given for _, piece in pieces})
    forms = [_form([piece for _, piece in pieces]) for pieces in given]
    zeros = _Zeros(device)
    flat = [
        [
            zeros.of(lengths[p], dtype) if piece is None else forms[p].flat(where, piece)
            for p, (where, piece) in enumerate(row)
        ]
        for row, dtype in zip(named, dtypes, strict=True)
    ]
    return Pieces(flat, lengths, dtypes, device, forms)


def _check_lengths(
    name: str, row: Sequence[tuple[str, Tensor | None]], lengths: list[int], like: str
) -> None:
    found = [piece.numel() if piece is not None else None for _, piece in row]
    same = len(found) == len(lengths) and all(
        length is None or length == lengths[p] for p, length in enumerate(found)
    )
    if not same:
        raise ValueError(f"{name}: found pieces of lengths {found}, accepted: {lengths} as {like}")


def _device(name: str, found: set[torch.device]) -> torch.device:
    """The one device of all pieces."""
    devices = found or {torch.device("cpu")}
    if len(devices) > 1 or next(iter(devices)).type not in ("cpu", "cuda"):
        raise ValueError(
            f"{name}: found devices {sorted(map(str, devices))}, accepted: one CPU or CUDA device"
        )
    return devices.pop()


def _given(
    name: str, named: Sequence[Sequence[tuple[str, Tensor | None]]], index: int
) -> list[tuple[str, Tensor]]:
    """Piece ``index`` of the rows where it is not None."""
    found = [(where, piece) for row in named for where, piece in row[index : index + 1] if piece is not None]
    if not found:
        raise ValueError(
            f"{name}: found None as piece {index} of every row, accepted: a tensor in at least one row "
            "(leave out parameters that no objective uses)"
        )
    return found


class _Zeros:
    """Zeros for missing pieces: one tensor per dtype, as long as the longest piece, serves all."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._kept: dict[torch.dtype, Tensor] = {}

    def of(self, length: int, dtype: torch.dtype) -> Tensor:
        kept = self._kept.get(dtype)
        if kept is None or kept.numel() < length:
            kept = self._kept[dtype] = torch.zeros(length, dtype=dtype, device=self._device)
        return kept[:length]


def _dtype(name: str, row: list[Tensor | None]) -> torch.dtype:
    """The one dtype of a row's pieces."""
    found = {piece.dtype for piece in row if piece is not None} or {torch.float32}
    if len(found) > 1 or next(iter(found)) not in DTYPE_CODES:
        raise ValueError(
            f"{name}: found element types {sorted(map(str, found))}, "
            "accepted: one of float32, bfloat16, float16"
        )
    return found.pop()


def parse_segments(segments: Segments | None, total: int) -> npt.NDArray[np.int64] | None:
    """Check that ``[start, end)`` pairs are sorted and disjoint within ``[0, total)``; int64 ``[S, 2]``.

    None stays None. Checks all pairs at once, because thousands of segments are an ordinary case.
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
    """Check the diagonal weight: one fp32 value per element, or none."""
    if weight is None:
        return Weight([])
    values = weight.values if isinstance(weight, InverseRoot) else weight
    lengths = [piece.numel() for _, piece in _split("weight", values)]
    if lengths != rows.lengths:
        raise ValueError(f"weight: found pieces of lengths {lengths}, accepted: {rows.lengths} as the rows")
    pieces = rows.flat("weight", values)
    for piece in pieces:
        if piece.dtype != torch.float32 or piece.device != rows.device:
            raise ValueError(
                f"weight: found {piece.dtype} on {piece.device}, accepted: torch.float32 on {rows.device}"
            )
    if not isinstance(weight, InverseRoot):
        return Weight(pieces)
    limits = torch.finfo(torch.float32)  # the kernels compute the factors in fp32
    if not (limits.tiny <= weight.correction <= limits.max and 0 <= weight.eps <= limits.max):
        raise ValueError(
            f"weight: found the correction {weight.correction} and eps {weight.eps}, accepted: a correction "
            "above 0 and an eps of at least 0, finite in fp32"
        )
    return Weight(pieces, (1.0 / math.sqrt(weight.correction), weight.eps))


def operands(rows: Pieces, weight: Weight) -> Iterator[tuple[str, Tensor]]:
    """What an inner product reads, with names for errors."""
    for i, row in enumerate(rows.pieces):
        yield from ((f"rows[{i}]", piece) for piece in row)
    yield from (("weight", piece) for piece in weight.pieces)


def check_matrix(name: str, matrix: Tensor, device: torch.device) -> int:
    """Check a contiguous float64 ``[m, m]`` matrix on ``device`` and return m."""
    square = matrix.dim() == 2 and matrix.shape[0] == matrix.shape[1] and matrix.is_contiguous()
    if not square or matrix.dtype != torch.float64 or matrix.device != device:
        raise ValueError(
            f"{name}: found {matrix.dtype} of shape {tuple(matrix.shape)} on {matrix.device}, accepted: "
            f"contiguous torch.float64 [m, m] on {device}"
        )
    return int(matrix.shape[0])


def parse_out(out: Row, rows: Pieces) -> Pieces:
    """Check the output: shaped like a row, any accepted dtype, memory of its own or exactly one of the rows.

    Raises:
        ValueError: another shape or device, memory that overlaps a row in part, or, while gradients are
            recorded, an output or a row that requires grad.
    """
    named = _split("out", out)
    for name, piece in named:
        require_writable(name, piece)
    for i, row in enumerate(rows.pieces):
        for piece in row:
            require_constant(f"rows[{i}]", piece)
    given = [piece for _, piece in named]
    lengths = [piece.numel() for piece in given]
    devices = {piece.device for piece in given}
    if lengths != rows.lengths or not devices <= {rows.device}:
        raise ValueError(
            f"out: found pieces of lengths {lengths} on {sorted(map(str, devices))}, accepted: "
            f"{rows.lengths} on {rows.device} as the rows"
        )
    dtype = _dtype("out", [*given])
    parsed = replace(rows, pieces=[rows.flat("out", out)], dtypes=[dtype])
    targets = sorted((*extent(piece), p) for p, piece in enumerate(parsed.pieces[0]) if piece.numel())
    for (_, end, p), (begin, _, q) in pairwise(targets):
        if begin < end:
            raise ValueError(f"out: pieces {p} and {q} overlap, accepted: disjoint pieces")
    for i, row in enumerate(rows.pieces):
        for p, piece in enumerate(row):
            _refuse_overlap(f"rows[{i}]", p, piece, targets, dtype)
    return parsed


def _refuse_overlap(
    name: str, index: int, piece: Tensor, targets: list[tuple[int, int, int]], dtype: torch.dtype
) -> None:
    """Refuse a row's piece that overlaps ``targets``, unless it is the same piece of the same dtype.

    ``targets``: begin, end and index of the output's pieces, sorted and disjoint.
    """
    begin, end = extent(piece)
    first = bisect_right(targets, begin, key=lambda target: target[1])
    if begin == end or first == len(targets) or targets[first][0] >= end:
        return
    target_begin, target_end, target_index = targets[first]
    if (begin, end, index) != (target_begin, target_end, target_index) or piece.dtype != dtype:
        raise ValueError(
            f"out: piece {target_index} overlaps piece {index} of {name}, accepted: memory of its own, "
            "or exactly one of the rows"
        )
