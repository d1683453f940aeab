"""Adding weighted summands to several rows at once."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from itertools import pairwise

import torch
from torch import Tensor

from gapo_mega.ops import _native, cpu, portable
from gapo_mega.ops.arguments import DTYPE_CODES, require_memory
from gapo_mega.ops.compiling import never_compiled
from gapo_mega.ops.in_place import extent, require_constant, require_writable, written

_SIZE = 4  # bytes of an element of a row


@never_compiled
def accumulate_(
    rows: Sequence[Tensor], coefficients: Tensor, terms: Tensor, *, overwrite: bool = False
) -> None:
    """Add ``sum_b coefficients[k, b] terms[b]`` to row k, for all rows at once and in fp32.

    On a CPU one kernel reads the terms once for up to 8 rows, twice for more, and every row once; the result
    is the same bit for bit for any number of threads. On a CUDA device torch's ``addmm`` and ``addmv`` do the
    work, once per tensor of ``rows``. A NaN or Inf in ``terms[b, i]`` makes element i of every row NaN or
    Inf, also of rows whose coefficient of b is zero. Like torch's own operations in place it counts as a
    change of the rows.

    Args:
        rows: M rows of N elements, 1 <= M <= 16, in tensors that hold a row ``[N]`` or some rows ``[K, N]``,
            each contiguous, with any distance from one to the next. float32, on one CPU or CUDA device.
        coefficients: float32 ``[M, B]`` on the rows' device; B may be 0.
        terms: ``[B, N]`` on the rows' device, float32, bfloat16 or float16, rows contiguous, with any
            distance from one to the next.
        overwrite: the old elements of the rows do not count, whatever they are.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, rows that overlap one another, the terms or
            the coefficients, or an operand that requires grad while gradients are recorded.
    """
    _check_terms(terms)
    length, device = terms.shape[1], terms.device
    begins: list[int] = []
    for index, row in enumerate(rows):
        begins += _begins(f"rows[{index}]", row, length, device)
    if not 1 <= len(begins) <= _native.max_rows:
        raise ValueError(f"rows: found {len(begins)} rows, accepted: 1 to {_native.max_rows}")
    _check_coefficients(coefficients, (len(begins), terms.shape[0]), device)
    if length == 0:
        return
    factors = coefficients.contiguous()
    _require_apart(begins, factors, terms)
    if device.type == "cpu":
        cpu.accumulate(begins, factors, terms, overwrite)
    else:
        portable.accumulate(rows, factors, terms, overwrite)
    written(rows)


def _check_terms(terms: Tensor) -> None:
    require_memory("terms", terms)
    require_constant("terms", terms)
    if terms.dim() != 2 or terms.dtype not in DTYPE_CODES or terms.device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"terms: found {terms.dtype} of shape {tuple(terms.shape)} on {terms.device}, accepted: float32, "
            "bfloat16 or float16 of shape [B, N] on a CPU or CUDA device"
        )
    _require_rows("terms", terms)


def _check_coefficients(coefficients: Tensor, shape: tuple[int, int], device: torch.device) -> None:
    require_memory("coefficients", coefficients)
    require_constant("coefficients", coefficients)
    if coefficients.shape != shape or coefficients.dtype != torch.float32 or coefficients.device != device:
        raise ValueError(
            f"coefficients: found {coefficients.dtype} of shape {tuple(coefficients.shape)} on "
            f"{coefficients.device}, accepted: torch.float32 of shape {shape} on {device}"
        )


def _begins(name: str, rows: Tensor, length: int, device: torch.device) -> list[int]:
    """The addresses of the rows that one checked tensor holds."""
    require_memory(name, rows)
    shape = rows.shape
    if (
        len(shape) not in (1, 2)
        or shape[-1] != length
        or rows.dtype != torch.float32
        or rows.device != device
    ):
        raise ValueError(
            f"{name}: found {rows.dtype} of shape {tuple(shape)} on {rows.device}, accepted: "
            f"torch.float32 of shape [{length}] or [K, {length}] on {device}"
        )
    _require_rows(name, rows)
    require_writable(name, rows)
    begin = rows.data_ptr()
    if len(shape) == 1:
        return [begin]
    step = rows.stride(0) * _SIZE
    return [begin + k * step for k in range(shape[0])]


def _require_rows(name: str, tensor: Tensor) -> None:
    if tensor.shape[-1] > 1 and tensor.stride(-1) != 1:
        raise ValueError(
            f"{name}: found strides {tensor.stride()}, accepted: contiguous rows (contiguous() makes them so)"
        )


def _require_apart(begins: list[int], coefficients: Tensor, terms: Tensor) -> None:
    """Raise ``ValueError`` if rows share memory with one another or with another operand."""
    count, length = terms.shape
    size = length * _SIZE
    starts = sorted(begins)
    if any(after - before < size for before, after in pairwise(starts)):
        raise ValueError("rows: found rows that overlap, accepted: memory of its own for each")
    if _meets(*extent(coefficients), starts, size):
        raise ValueError("coefficients: overlaps rows, accepted: memory of its own")
    if count == 0:
        return
    begin, step = terms.data_ptr(), terms.stride(0) * terms.itemsize
    width = length * terms.itemsize
    if not _meets(begin, begin + (count - 1) * step + width, starts, size):
        return
    # The terms may still lie between the rows.
    for b in range(count):
        if _meets(begin + b * step, begin + b * step + width, starts, size):
            raise ValueError(f"terms: row {b} overlaps rows, accepted: memory of its own")


def _meets(begin: int, end: int, starts: list[int], size: int) -> bool:
    """Whether ``[begin, end)`` shares an address with one of the disjoint rows of ``size`` bytes."""
    first = bisect_right(starts, begin - size)
    return begin < end and first < len(starts) and starts[first] < end
