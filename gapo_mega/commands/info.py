"""``gapo-mega info``: versions, devices and optional packages."""

from __future__ import annotations

import platform
from importlib.metadata import PackageNotFoundError, version


def info() -> None:
    """Show versions, the compiled extension, devices, and which optional packages are usable."""
    import torch

    from gapo_mega import ops, optional

    print(f"gapo-mega      {installed('gapo-mega')}")
    print(f"python         {platform.python_version()} on {platform.machine()}")
    for package in ("torch", "megatron-core", "transformers", "datasets"):
        print(f"{package:<14} {installed(package)}")
    print(f"extension      {', '.join(f'{key} {value}' for key, value in ops.info().items())}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices        {', '.join(devices) or 'CPU only (no CUDA device)'}")
    for index, name in enumerate(devices):
        fault = ops.fault_of(torch.device("cuda", index))
        how = f"slower torch operations in their place: {fault}" if fault else "compiled"
        print(f"kernels        {name}: {how}")
    probes = {
        "transformer-engine": optional.transformer_engine(),
        "apex": optional.apex(),
        "wandb": optional.wandb(),
        "serve": optional.serve(),
    }
    for name, probe in probes.items():
        # Found is not used: a run decides, and Transformer Engine's layers need a GPU.
        idle = name == "transformer-engine" and probe.usable and not optional.transformer_engine_layers()
        state = (
            "usable on GPUs only, and there is none" if idle else "usable" if probe.usable else "not usable"
        )
        print(f"{name:<18} {state}: {probe.found}")
        if probe.lost:
            print(f"{'':<18} without it: {probe.lost}")


def installed(package: str) -> str:
    """The version of an installed distribution, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
