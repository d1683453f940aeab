"""Whether the compiled kernels run on a device: asked once, told in words."""

from __future__ import annotations

import logging
from functools import cache

import torch

from gapo_mega.ops import _native

NO_OBSTACLE, DRIVER = 0, 1  # Obstacle in csrc/api.h

logger = logging.getLogger(__name__)


def usable(device: torch.device) -> bool:
    """Whether the kernels run on a CUDA device; warns once where torch operations take their place.

    Raises:
        RuntimeError: as ``fault_of``.
    """
    fault = fault_of(device)
    if fault:
        _warn(fault)
    return not fault


def fault_of(device: torch.device) -> str:
    """Why the kernels do not run on a CUDA device, and what to do about it; empty if they do.

    Raises:
        RuntimeError: there is no such device, or it has failed.
    """
    if not _native.has_cuda:
        return "the extension was built without nvcc; install it again with nvcc on PATH and GAPO_CUDA=ON"
    return _probed(torch.cuda.current_device() if device.index is None else device.index)


@cache
def _probed(index: int) -> str:
    with torch.cuda.device(index):  # the probe loads a kernel for the current device
        probe = _native.cuda_probe(index)
        name, (major, minor) = torch.cuda.get_device_name(), torch.cuda.get_device_capability()
    return explain(probe, _native.cuda_archs(), name, f"{major}{minor}")


def explain(probe: _native.Probe, built: list[str], name: str, capability: str) -> str:
    """What ``probe`` found on the device ``name`` of compute capability ``capability``, in words."""
    if probe.obstacle == NO_OBSTACLE:
        return ""
    driver, runtime = _version(probe.driver), _version(probe.runtime)
    found = (
        f"compiled with CUDA {runtime} for {', '.join(built)}; {name} is sm_{capability}, and its driver "
        f"supports CUDA {driver} ({probe.error})"
    )
    if probe.obstacle == DRIVER:
        way = f"with the nvcc of CUDA {probe.driver // 1000}: CUDACXX=/path/to/nvcc GAPO_CUDA=ON"
    else:
        way = f"with an nvcc that knows this device: GAPO_CUDA=ON GAPO_CUDA_ARCHS={capability}"
    return f"{found}; install it again {way}"


def _version(number: int) -> str:
    return f"{number // 1000}.{number % 1000 // 10}"


@cache
def _warn(fault: str) -> None:
    logger.warning(
        "gapo_mega's kernels do not run here; slower torch operations combine the gradients on the GPU: %s",
        fault,
    )
