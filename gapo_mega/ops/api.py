"""The public operations: they check their arguments and call the back end of the tensors' device."""

from __future__ import annotations

from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapo_mega.ops import _native, cpu, cuda, kernels, portable
from gapo_mega.ops.arguments import (
    Gradient,
    InverseRoot,
    Pieces,
    Row,
    Segments,
    check_matrix,
    operands,
    parse_out,
    parse_rows,
    parse_segments,
    parse_weight,
    pieces_of,
)
from gapo_mega.ops.compiling import never_compiled
from gapo_mega.ops.in_place import require_apart, require_constant, require_writable, written


class Status(IntEnum):
    """How a search for weights ended; with anything but OK all weights are zero."""

    OK = 0
    NOT_FINITE = 1  # a NaN or Inf in the Gram matrix
    NEGATIVE_DIAGONAL = 2
    NOT_CONVERGED = 3  # not positive semidefinite, or a method of another kind found no weights
    ZERO_GRADIENT = 4  # a gradient is zero, and the aggregator's options refuse that
    OUT_OF_RANGE = 5  # fp32, in which combine_ works, does not hold the weights or their combination


@never_compiled
def gramian(
    rows: Sequence[Gradient],
    *,
    segments: Segments | None = None,
    weight: Row | InverseRoot | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Inner products of the rows, ``G_ij = sum_k weight_k rows_i[k] rows_j[k]`` over the counted k.

    Products and sums are in fp64, so the error is below 1e-10 of ``|g_i| |g_j|`` for any rows. The factors of
    an :class:`InverseRoot` are rounded to fp32 (not in the torch fallback), which adds 3e-7 of the norms with
    those factors. The result is the same bit for bit: on a CPU for any number of threads, on a CUDA device
    from run to run. A NaN or Inf in row i makes ``G_ii`` not finite. Takes one pass over memory for up to 8
    rows, tiles for more, and less than a MiB of extra memory.

    Args:
        rows: M rows, 1 to 16: each a tensor of N elements, or the sequence of its pieces, as
            ``torch.autograd.grad`` returns them: tensors of any shape (the same in every row; a flat piece
            matches any shape of its length). float32, bfloat16 or float16, one dtype per row; all on one
            device. Nothing is copied, so a piece must be contiguous in all rows, or have the same dense
            memory order in all rows (gradients of convolutions, say). A piece that is None
            (``allow_unused=True``) counts as zeros; the call allocates zeros as long as the longest such
            piece.
        segments: sorted disjoint ``[start, end)`` ranges of positions that count, over the concatenated
            pieces, which must be contiguous; None counts all. Thousands of ranges cost next to nothing.
        weight: N float32 factors, one per position, in pieces like a row, or an :class:`InverseRoot` that
            makes the factors; None is all ones.
        out: float64 ``[M, M]`` on the rows' device; the result is added to it, and it is returned.

    Returns:
        float64 ``[M, M]`` on the rows' device.

    Raises:
        ValueError: rows that do not match, a piece that has no flat view or is None in every row, segments
            that are unsorted or out of range, or a weight that does not match the rows.
    """
    parsed = parse_rows("rows", rows)
    ranges = parse_segments(segments, parsed.total)
    if ranges is not None:
        parsed.require_own_order("segments")
    factors = parse_weight(weight, parsed)
    if out is None:
        out = torch.zeros(parsed.count, parsed.count, dtype=torch.float64, device=parsed.device)
    elif check_matrix("out", out, parsed.device) != parsed.count:
        raise ValueError(f"out: found shape {tuple(out.shape)}, accepted: [{parsed.count}, {parsed.count}]")
    else:
        require_writable("out", out)
        require_apart("out", out, operands(parsed, factors))
    if parsed.device.type == "cpu":
        cpu.gramian(parsed, ranges, factors, out)
    elif not kernels.usable(parsed.device):
        portable.gramian(parsed, ranges, factors, out)
    else:
        cuda.gramian(parsed, ranges, factors, out)
    written([out])
    return out


@never_compiled
def min_norm(gram: Tensor) -> Tensor:
    """``argmin over the simplex of w' gram w``: the point of the rows' convex hull that is nearest to zero.

    Exact to rounding for rows of any norms: every violation of the optimality conditions is below 1e-9 of its
    summands. Where there are several minimisers, up to rounding, they form a polytope, and this returns the
    mean of its corners, which are the minimisers whose rows need each other. So the order of the rows does
    not matter, and duplicated rows, and rows of zeros, share alike.

    Args:
        gram: ``[M, M]``, symmetric, 1 <= M <= 16, on any device (the solver runs on the host).

    Returns:
        float64 ``[M]`` on gram's device, nonnegative, with sum 1.

    Raises:
        ValueError: ``gram`` is not square, symmetric or positive semidefinite, or has a NaN, an Inf or a
            negative diagonal.
    """
    host = gram.detach().to("cpu", torch.float64).contiguous()
    m = _check_gram(host)
    weights = torch.empty(m, dtype=torch.float64, device="cpu")
    status = _native.min_norm(host.data_ptr(), m, False, weights.data_ptr())
    # Puts the status into words, with numpy because torch's dispatch would take longer than the solver.
    matrix = host.numpy()
    diagonal = matrix.diagonal()
    if status == Status.NOT_FINITE:
        rows = np.flatnonzero(~np.isfinite(diagonal)).tolist()
        raise ValueError(f"gram: found NaN or Inf (rows {rows}), accepted: finite numbers")
    if status == Status.NEGATIVE_DIAGONAL:
        raise ValueError(f"gram: found the diagonal {diagonal.tolist()}, accepted: no negative entry")
    norms = np.sqrt(diagonal)
    if (np.abs(matrix - matrix.T) > 1e-6 * np.multiply.outer(norms, norms)).any():
        raise ValueError(f"gram: found {host.tolist()}, accepted: a symmetric matrix")
    if status != Status.OK:
        raise ValueError(f"gram: found {host.tolist()}, accepted: a positive semidefinite matrix")
    return weights.to(gram.device)


@never_compiled
def min_norm_(weights: Tensor, status: Tensor, gram: Tensor, *, exclude_zero: bool = False) -> None:
    """``min_norm`` into tensors, with a status instead of errors; it does not wait for a CUDA device.

    For up to 8 rows the device tries all support sets at once, with the host's arithmetic and the same
    choice. For more rows one of its threads does what the host does, which can take a second where most of 16
    rows are tied.

    Args:
        weights: float64 ``[M]``, receives the minimiser, or zeros if ``status`` is not OK.
        status: int32 ``[1]``, receives a :class:`Status`.
        gram: float64 ``[M, M]``, 1 <= M <= 16, assumed symmetric; all three on one device.
        exclude_zero: give weight zero to rows of norm zero, instead of all weight to them. If all rows have
            norm zero, every weight is zero.

    Raises:
        RuntimeError: the device is a CUDA device on which the compiled kernels do not run.
        ValueError: another shape, dtype or device.
    """
    m = _check_gram(gram)
    for name, tensor, dtype, length in (
        ("weights", weights, torch.float64, m),
        ("status", status, torch.int32, 1),
    ):
        if tensor.shape != (length,) or tensor.dtype != dtype or tensor.device != gram.device:
            raise ValueError(
                f"{name}: found {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, accepted: "
                f"{dtype} of shape ({length},) on {gram.device}"
            )
        if not tensor.is_contiguous():
            raise ValueError(f"{name}: found strides {tensor.stride()}, accepted: a contiguous tensor")
        require_writable(name, tensor)
        require_apart(name, tensor, [("gram", gram)])
    require_apart("status", status, [("weights", weights)])
    if gram.device.type == "cpu":
        status[0] = _native.min_norm(gram.data_ptr(), m, exclude_zero, weights.data_ptr())
    else:
        cuda.min_norm(gram, weights, status, exclude_zero)
    written([weights, status])


@never_compiled
def duality_gap(gram: Tensor, weights: Tensor) -> float:
    """``w'Gw - min_i (Gw)_i``, a certificate for any weights on the simplex.

    It bounds ``||x - x*||^2`` between their combination x and the minimum-norm point x*, and is zero exactly
    at the minimum (Wolfe 1976). Computed with twice the precision of float64.

    Args:
        gram: ``[M, M]``, 1 <= M <= 16.
        weights: ``[M]``, nonnegative, with sum 1.
    """
    host = gram.detach().to("cpu", torch.float64).contiguous()
    m = _check_gram(host)
    given = weights.detach().to("cpu", torch.float64).contiguous()
    if given.shape != (m,):
        raise ValueError(f"weights: found shape {tuple(given.shape)}, accepted: ({m},)")
    return _native.duality_gap(host.data_ptr(), m, given.data_ptr())


def _check_gram(gram: Tensor) -> int:
    m = check_matrix("gram", gram, gram.device)
    if not 1 <= m <= _native.max_rows:
        raise ValueError(f"gram: found {m} rows, accepted: 1 to {_native.max_rows}")
    return m


@never_compiled
def combine_(out: Row, rows: Sequence[Gradient], weights: Tensor | Sequence[float]) -> Row:
    """Write ``sum_i weights[i] rows[i]`` to ``out``, in one pass and in fp32.

    Does not read rows of weight zero. Like torch's own operations in place it counts as a change of ``out``,
    so a backward that needs the old values fails.

    Args:
        out: shaped like a row, in the same pieces without None and in the rows' memory order, such as the
            ``p.grad`` of the parameters. float32, bfloat16 or float16, one dtype; memory of its own or
            exactly one of the rows.
        rows: as for :func:`gramian`.
        weights: M factors: numbers, or a tensor on the host or on the rows' device. The kernel reads a tensor
            on the rows' CUDA device there, without synchronisation and unchecked; it rounds them to fp32.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, dtypes or devices that do not match, ``out`` that overlaps a row in part, ``out``,
            a row or weights that require grad while gradients are recorded (``torch.no_grad()`` ends that),
            or weights on the host that are not finite, or whose largest is outside fp32's normal range.
    """
    parsed = parse_rows("rows", rows)
    target = parse_out(out, parsed)
    if isinstance(weights, Tensor):
        require_constant("weights", weights)
    if parsed.device.type == "cpu":
        cpu.combine(target, parsed, _host_weights(weights, parsed.count))
    elif not kernels.usable(parsed.device):
        portable.combine(target, parsed, _device_weights(weights, parsed))
    else:
        cuda.combine(target, parsed, _device_weights(weights, parsed))
    written(pieces_of("out", out))
    return out


def _host_weights(weights: Tensor | Sequence[float], count: int) -> list[float]:
    found: Any = weights.tolist() if isinstance(weights, Tensor) else weights
    try:
        values = [float(w) for w in found]
    except TypeError:  # no list, or None, complex numbers or lists in it
        values = []
    if len(values) != count:
        raise ValueError(f"weights: found {found}, accepted: {count} numbers, one a row")
    limits = torch.finfo(torch.float32)
    largest = max(map(abs, values))
    # The first fails for NaN, too. Weights that are all too small would be rounded to few digits, or to 0.
    if not all(abs(w) <= limits.max for w in values) or 0 < largest < limits.tiny:
        raise ValueError(
            f"weights: found {values}, accepted: finite numbers of float32, the largest one from "
            f"{limits.tiny:.2g} to {limits.max:.2g} without the sign"
        )
    return values


def _device_weights(weights: Tensor | Sequence[float], rows: Pieces) -> Tensor:
    if not isinstance(weights, Tensor) or weights.device.type == "cpu":
        values = _host_weights(weights, rows.count)
        return torch.tensor(values, dtype=torch.float64, device=rows.device)
    if weights.shape != (rows.count,) or weights.device != rows.device:
        raise ValueError(
            f"weights: found shape {tuple(weights.shape)} on {weights.device}, accepted: "
            f"({rows.count},) on {rows.device} or the CPU"
        )
    return weights.to(torch.float64).contiguous()


def info() -> dict[str, Any]:
    """What is compiled and in use: ``isa``, ``has_cuda``, ``cuda_archs``, ``threads``.

    ``isa`` is the CPU instruction set in use ("avx512", "avx2" or "baseline"; the environment variable
    GAPO_ISA can choose it). ``threads`` is torch's number of intra-op threads, which the kernels use, too.
    """
    return {
        "isa": cpu.active_isa(),
        "has_cuda": _native.has_cuda,
        "cuda_archs": _native.cuda_archs(),
        "threads": torch.get_num_threads(),
    }
