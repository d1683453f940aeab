"""The operations on CUDA tensors, which enqueue on the current stream and never wait for the device.

The back end wants the tensors' device to be the current one. torch's guard makes it so: it knows which
devices have a context, and makes none on the way back.

Plans (a table on the device of the elements that count) and workspaces stay alive between calls. So after the
first step, a step allocates no device memory beyond torch's cache.
"""

from __future__ import annotations

import threading
from functools import cache, lru_cache

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from gapo_mega.ops import _native
from gapo_mega.ops.arguments import Pieces, Weight
from gapo_mega.ops.constants import resident
from gapo_mega.ops.kernels import fault_of


def require_kernels(device: torch.device) -> None:
    """Raise ``RuntimeError`` if the compiled kernels do not run on ``device``."""
    fault = fault_of(device)
    if fault:
        raise RuntimeError(f"no CUDA back end: {fault}")


def _place(device: torch.device) -> tuple[int, int]:
    """The device's index and the handle of its current stream."""
    index = device.index if device.index is not None else torch.cuda.current_device()
    return index, torch.cuda.current_stream(device).cuda_stream


# Never freed, because a captured CUDA graph keeps reading the table. There is one per gradient layout, so
# few.
@cache
def _plan(
    lengths: tuple[int, ...], segments: bytes | None, device: torch.device
) -> tuple[_native.Plan, Tensor]:
    ranges = None if segments is None else np.frombuffer(segments, dtype=np.int64).reshape(-1, 2)
    plan = _native.cuda_plan(lengths, ranges)
    return plan, resident(torch.tensor(plan.table, dtype=torch.int64, device="cpu"), device)


@lru_cache(maxsize=8)
def _kept_workspace(m: int, device: int, stream: int, thread: int) -> Tensor:
    # One per stream and thread: a thread's calls on a stream run one after the other, so they can share it.
    del stream, thread
    size = _native.cuda_workspace_size(m, device)
    return torch.empty(size, dtype=torch.float64, device=torch.device("cuda", device))


def _workspace(m: int, device: int, stream: int) -> Tensor:
    if torch.cuda.is_current_stream_capturing():
        # Allocates from the graph's own pool, so that it lives as long as the graph and not as the cache.
        size = _native.cuda_workspace_size(m, device)
        return torch.empty(size, dtype=torch.float64, device=torch.device("cuda", device))
    return _kept_workspace(m, device, stream, threading.get_ident())


def gramian(rows: Pieces, segments: npt.NDArray[np.int64] | None, weight: Weight, out: Tensor) -> None:
    """Enqueue adding the Gram matrix of checked rows to ``out``, float64 ``[m, m]`` on the same device."""
    require_kernels(rows.device)
    ranges = None if segments is None else segments.tobytes()
    plan, table = _plan(tuple(rows.lengths), ranges, rows.device)
    with torch.cuda.device(rows.device):
        device, stream = _place(rows.device)
        workspace = _workspace(rows.count, device, stream)
        _native.cuda_gramian(
            rows.addresses,
            rows.lengths,
            rows.dtype_codes,
            weight.addresses,
            weight.inverse_root,
            plan,
            table.data_ptr(),
            workspace.data_ptr(),
            out.data_ptr(),
            device,
            stream,
        )


def combine(out: Pieces, rows: Pieces, weights: Tensor) -> None:
    """Enqueue the weighted sum of checked rows into ``out``; ``weights``: float64 ``[m]`` on the device."""
    require_kernels(rows.device)
    with torch.cuda.device(rows.device):
        device, stream = _place(rows.device)
        _native.cuda_combine(
            rows.addresses,
            rows.lengths,
            rows.dtype_codes,
            weights.data_ptr(),
            out.addresses,
            out.dtype_codes[0],
            device,
            stream,
        )


def min_norm(gram: Tensor, weights: Tensor, status: Tensor, exclude_zero: bool) -> None:
    """Enqueue the solver for a checked ``gram``."""
    require_kernels(gram.device)
    with torch.cuda.device(gram.device):
        device, stream = _place(gram.device)
        _native.cuda_min_norm(
            gram.data_ptr(),
            gram.shape[0],
            exclude_zero,
            weights.data_ptr(),
            status.data_ptr(),
            device,
            stream,
        )
