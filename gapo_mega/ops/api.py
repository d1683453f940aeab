"""The operations that the package uses; arguments are checked here and sent to the right back end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapo_mega.ops import _native, cpu, cuda, portable
from gapo_mega.ops.arguments import (
    Gradient,
    InverseRoot,
    Pieces,
    Row,
    Segments,
    check_matrix,
    parse_out,
    parse_rows,
    parse_segments,
    parse_weight,
)


class Status(IntEnum):
    """How weights were found on a device; with anything but OK they are all zero."""

    OK = 0
    NOT_FINITE = 1  # a NaN or Inf in the Gram matrix
    NEGATIVE_DIAGONAL = 2
    NOT_CONVERGED = 3  # not positive semidefinite, or more than 8 rows and rounding stopped the search
    ZERO_GRADIENT = 4  # an aggregator that was told to stop at one
    OUT_OF_RANGE = 5  # the weights leave double precision


def gramian(
    rows: Sequence[Gradient],
    *,
    segments: Segments | None = None,
    weight: Row | InverseRoot | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Inner products of the rows, ``G_ij = sum_k weight_k rows_i[k] rows_j[k]`` over the counted k.

    Products are formed and summed in fp64: the error is below 1e-10 of ``|g_i| |g_j|``, whatever the
    rows hold; the fp32 roundings of an :class:`InverseRoot`'s factors (none in the torch fallback) come on
    top, 3e-7 of the norms with those factors. On a CPU the result is the same, bit for bit, for any number
    of threads; on a CUDA device from run to run. A NaN or Inf in row i makes ``G_ii`` not finite. One pass
    over memory up to 8 rows, tiles beyond; less than a MiB of extra memory.

    Args:
        rows: M rows, 1 to 16: each a tensor of N elements, or the sequence of its pieces, as
            ``torch.autograd.grad`` gives them: tensors of any shape (the same in every row; a flat piece goes
            with any shape of its length). float32, bfloat16 or float16, one type a row; all on one device.
            Nothing is copied, so a piece has to be contiguous in all rows, or have the same dense order of
            memory in all rows (gradients of convolutions, say). A piece that is None
            (``allow_unused=True``) counts as zeros; zeros of the longest one are allocated for the call.
        segments: sorted disjoint ``[start, end)`` ranges of positions that count, over the
            concatenated pieces, all contiguous; None counts all. Thousands cost next to nothing.
        weight: N float32 factors, one a position, in pieces like a row, or the values that an
            :class:`InverseRoot` makes factors of; None is all ones.
        out: float64 ``[M, M]`` on the rows' device that the result is added to, and that is returned.

    Returns:
        float64 ``[M, M]`` on the rows' device.

    Raises:
        ValueError: rows that do not fit together, a piece that cannot be read as a flat view or is None in
            every row, segments that are unsorted or out of range, or a weight that does not fit the rows.
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
    if parsed.device.type == "cpu":
        cpu.gramian(parsed, ranges, factors, out)
    elif parsed.device.type == "cuda" and not _native.has_cuda:
        portable.warn_once()
        portable.gramian(parsed, ranges, factors, out)
    else:
        cuda.gramian(parsed, ranges, factors, out)
    return out


def min_norm(gram: Tensor) -> Tensor:
    """``argmin over the simplex of w' gram w``: the point nearest to zero of the rows' convex hull.

    Exact to rounding whatever the rows' norms: every violation of the optimality conditions is below
    1e-9 of the summands that it is made of. A zero row takes all the weight. Where there are several
    minimisers, up to rounding, the one with the fewest, then the lowest rows is returned (among at
    most 8 rows that could take part; beyond, the one that Wolfe's algorithm reaches, always the same).

    Args:
        gram: ``[M, M]``, symmetric, 1 <= M <= 16, on any device (the solver runs on the host).

    Returns:
        float64 ``[M]``, not negative, of sum 1, on gram's device.

    Raises:
        ValueError: not square, not symmetric, a NaN or Inf, or a negative diagonal.
    """
    host = gram.detach().to("cpu", torch.float64).contiguous()
    m = _check_gram(host)
    weights = torch.empty(m, dtype=torch.float64)
    status = _native.min_norm(host.data_ptr(), m, False, weights.data_ptr())
    # What the status says, in words; numpy, because torch's dispatch would take longer than the solver.
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


def min_norm_(weights: Tensor, status: Tensor, gram: Tensor, *, exclude_zero: bool = False) -> None:
    """``min_norm`` into tensors, with a status instead of errors; on a CUDA device without waiting for it.

    Up to 8 rows the device tries all support sets at once, with the host's arithmetic and the same
    choice. Beyond, one thread of it runs Wolfe's algorithm, without the host's last resort of trying all
    sets, so that ``NOT_CONVERGED`` is possible where the matrix is no Gram matrix to rounding.

    Args:
        weights: float64 ``[M]``, receives the minimiser, or zeros where ``status`` is not OK.
        status: int32 ``[1]``, receives a :class:`Status`.
        gram: float64 ``[M, M]``, 1 <= M <= 16; all three on one device. Taken as symmetric.
        exclude_zero: rows of norm zero get weight zero, instead of the first one getting all of it;
            where there are no others every weight is zero.

    Raises:
        RuntimeError: on a CUDA device, when the extension was built without CUDA.
        ValueError: another shape, type or device.
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
    if gram.device.type == "cpu":
        status[0] = _native.min_norm(gram.data_ptr(), m, exclude_zero, weights.data_ptr())
    else:
        cuda.min_norm(gram, weights, status, exclude_zero)


def duality_gap(gram: Tensor, weights: Tensor) -> float:
    """``w'Gw - min_i (Gw)_i``, a certificate for any weights on the simplex.

    It bounds ``||x - x*||^2`` between their combination x and the minimum-norm point x*, and is zero
    exactly at the minimum (Wolfe 1976). Formed with twice the precision.

    Args:
        gram: ``[M, M]``, 1 <= M <= 16.
        weights: ``[M]``, not negative, of sum 1.
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


def combine_(out: Row, rows: Sequence[Gradient], weights: Tensor | Sequence[float]) -> Row:
    """Writes ``sum_i weights[i] rows[i]`` to ``out``, in one pass and in fp32.

    Rows of weight zero are not read.

    Args:
        out: shaped like a row, in the same pieces without None and in the rows' order of memory, such as the
            ``p.grad`` of the parameters. float32, bfloat16 or float16, one type; memory of its own or
            exactly one of the rows.
        rows: as for :func:`gramian`.
        weights: M factors: numbers, or a tensor on the host or on the rows' device. A tensor on the
            rows' CUDA device is read there, without synchronisation and unchecked.

    Returns:
        ``out``.

    Raises:
        ValueError: shapes, types or devices that do not fit, ``out`` overlapping a row in part, or
            weights on the host that are not finite.
    """
    parsed = parse_rows("rows", rows)
    target = parse_out(out, parsed)
    if parsed.device.type == "cpu":
        cpu.combine(target, parsed, _host_weights(weights, parsed.count))
    elif parsed.device.type == "cuda" and not _native.has_cuda:
        portable.warn_once()
        portable.combine(target, parsed, _device_weights(weights, parsed))
    else:
        cuda.combine(target, parsed, _device_weights(weights, parsed))
    return out


def _host_weights(weights: Tensor | Sequence[float], count: int) -> list[float]:
    values: list[float] = weights.tolist() if isinstance(weights, Tensor) else [float(w) for w in weights]
    if not isinstance(values, list) or len(values) != count:
        raise ValueError(f"weights: found {values}, accepted: {count} numbers, one a row")
    if not all(math.isfinite(w) for w in values):
        raise ValueError(f"weights: found {values}, accepted: finite numbers")
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

    ``isa`` is the CPU instruction set in use ("avx512", "avx2", "baseline"; the environment variable
    GAPO_ISA names another), ``threads`` torch's number of intra-op threads, which the kernels use too.
    """
    return {
        "isa": cpu.active_isa(),
        "has_cuda": _native.has_cuda,
        "cuda_archs": _native.cuda_archs(),
        "threads": torch.get_num_threads(),
    }
