"""The operations that the package uses; arguments are checked here and sent to the right back end."""

from __future__ import annotations

import math
from collections.abc import Sequence
from enum import IntEnum
from typing import Any

import torch
from torch import Tensor

from gapo_mega.ops import _native, cpu, cuda, portable
from gapo_mega.ops.arguments import (
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
    """How ``min_norm_device`` ended; anything but OK leaves the weights at zero."""

    OK = 0
    NOT_FINITE = 1
    NEGATIVE_DIAGONAL = 2


def gramian(
    rows: Sequence[Row],
    *,
    segments: Segments | None = None,
    weight: Row | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """Inner products of the rows, ``G_ij = sum_k weight_k rows_i[k] rows_j[k]`` over the counted k.

    Products are summed in fp32 over short stretches and in fp64 beyond: a relative error of about 1e-6
    of ``|g_i| |g_j|`` at most. On a CPU the result is the same, bit for bit, for any number of threads.
    A NaN or Inf in row i makes ``G_ii`` not finite. Elements whose square leaves the fp32 range
    (beyond about 1e19, below about 1e-19) count as Inf or lose precision.

    Args:
        rows: M rows, 1 to 16: each a flat tensor of N elements, or the list of its pieces (the same
            lengths in every row). float32, bfloat16 or float16, all on one device.
        segments: sorted disjoint ``[start, end)`` ranges of positions that count, over the
            concatenated pieces; None counts all.
        weight: N float32 factors, one a position, in pieces like a row; None is all ones.
        out: float64 ``[M, M]`` on the rows' device that the result is added to, and that is returned.

    Returns:
        float64 ``[M, M]`` on the rows' device.

    Raises:
        ValueError: rows that do not fit together, or segments that are unsorted or out of range.
    """
    parsed = parse_rows("rows", rows)
    ranges = parse_segments(segments, parsed.total)
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
    1e-9 of the summands that it is made of. A zero row takes all the weight; of several minimisers the
    one with the fewest, then the lowest rows is returned.

    Args:
        gram: ``[M, M]``, symmetric, 1 <= M <= 16, on any device (the solver runs on the host).

    Returns:
        float64 ``[M]``, not negative, of sum 1, on gram's device.

    Raises:
        ValueError: not square, not symmetric, a NaN or Inf, or a negative diagonal.
    """
    host = gram.detach().to("cpu", torch.float64).contiguous()
    m = check_matrix("gram", host, torch.device("cpu"))
    diagonal = host.diagonal()
    if not bool(torch.isfinite(host).all()):
        rows = [i for i in range(m) if not math.isfinite(float(diagonal[i]))]
        raise ValueError(f"gram: found NaN or Inf (rows {rows}), accepted: finite numbers")
    if m and bool((diagonal < 0).any()):
        raise ValueError(f"gram: found the diagonal {diagonal.tolist()}, accepted: no negative entry")
    norms = diagonal.sqrt()
    if bool(((host - host.T).abs() > 1e-6 * torch.outer(norms, norms)).any()):
        raise ValueError(f"gram: found {host.tolist()}, accepted: a symmetric matrix")
    weights, status = _native.min_norm(host.flatten().tolist(), m)
    assert status == Status.OK
    return torch.tensor(weights, dtype=torch.float64, device=gram.device)


def min_norm_device(gram: Tensor, weights: Tensor, status: Tensor) -> None:
    """``min_norm`` on a CUDA device without waiting for it; equal to the host's result.

    Args:
        gram: float64 ``[M, M]``, M <= 8, on a CUDA device.
        weights: float64 ``[M]`` there, receives the minimiser, or zeros where ``status`` is not OK.
        status: int32 ``[1]`` there, receives a :class:`Status`.

    Raises:
        RuntimeError: no CUDA device, or the extension was built without CUDA.
        ValueError: another shape, type or device.
    """
    cuda.require_back_end()
    if gram.device.type != "cuda":
        raise ValueError(f"gram: found device {gram.device}, accepted: a CUDA device")
    m = check_matrix("gram", gram, gram.device)
    for name, tensor, dtype, length in (
        ("weights", weights, torch.float64, m),
        ("status", status, torch.int32, 1),
    ):
        if tensor.shape != (length,) or tensor.dtype != dtype or tensor.device != gram.device:
            raise ValueError(
                f"{name}: found {tensor.dtype} of shape {tuple(tensor.shape)} on {tensor.device}, accepted: "
                f"{dtype} of shape ({length},) on {gram.device}"
            )
    cuda.min_norm(gram, weights, status)


def combine_(out: Row, rows: Sequence[Row], weights: Tensor | Sequence[float]) -> Row:
    """Writes ``sum_i weights[i] rows[i]`` to ``out``, in one pass and in fp32.

    Rows of weight zero are not read.

    Args:
        out: shaped like a row (in the same pieces), float32, bfloat16 or float16; memory of its own or
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
