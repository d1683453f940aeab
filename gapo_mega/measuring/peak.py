"""The peak FLOP/s of a device: known by its name, or measured."""

from __future__ import annotations

import re
import time

import torch

# Dense bf16 tensor-core FLOP/s of one device from NVIDIA's data sheets, which print twice these numbers "with
# sparsity". First match wins, so the slower variants of a family stand before it.
_PEAK_BF16_DENSE: tuple[tuple[str, float], ...] = (
    (r"\bA100\b", 312e12),
    (r"\bH100 PCIe\b", 756e12),
    (r"\bH100 NVL\b", 835.5e12),
    (r"\bH100\b", 989.5e12),
    (r"\bH200 NVL\b", 835.5e12),
    (r"\bH200\b", 989.5e12),
    (r"\bGB200\b", 2500e12),
    (r"\bB200\b", 2250e12),
)


def known_peak_flops(device_name: str) -> float | None:
    """Peak dense bf16 FLOP/s of a device by the name that ``torch.cuda.get_device_name`` gives it.

    None where it is not in the table, and for a slice of a device (MIG), whose peak the name does not tell.
    """
    if re.search(r"\bMIG\b", device_name):
        return None
    for pattern, peak in _PEAK_BF16_DENSE:
        if re.search(pattern, device_name):
            return peak
    return None


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
