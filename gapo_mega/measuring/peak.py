"""The peak FLOP/s of a device, measured where no data sheet tells it."""

from __future__ import annotations

import time

import torch


def measure_gemm_peak(
    device: torch.device | str = "cpu",
    dtype: torch.dtype = torch.float32,
    size: int = 1024,
    seconds: float = 0.5,
) -> float:
    """FLOP/s of the fastest of repeated ``size`` x ``size`` matrix products within about ``seconds``.

    The stand-in for a data sheet on a CPU, with the number of threads that torch is set to.
    """
    device = torch.device(device)
    left = torch.randn(size, size, device=device, dtype=dtype)
    right = torch.randn(size, size, device=device, dtype=dtype)
    out = torch.empty_like(left)
    best = float("inf")
    torch.mm(left, right, out=out)  # the first call pays for start-up
    deadline = time.perf_counter() + seconds
    while True:
        _synchronize(device)
        start = time.perf_counter()
        torch.mm(left, right, out=out)
        _synchronize(device)
        end = time.perf_counter()
        best = min(best, end - start)
        if end >= deadline:
            return 2 * size**3 / best


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
