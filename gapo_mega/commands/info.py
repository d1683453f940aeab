"""``gapo-mega info``: versions, devices and optional packages."""

from __future__ import annotations

import platform
from collections.abc import Mapping
from dataclasses import asdict
from importlib.metadata import PackageNotFoundError, version

from packaging.version import Version

from gapo_mega.versions import TESTED, row_of


def info() -> None:
    """Show versions, the compiled extension, devices, and which optional packages are usable."""
    import torch

    from gapo_mega import ops, optional

    print(f"gapo-mega      {installed('gapo-mega')}")
    for line in beside_tested(
        platform.python_version(),
        {
            "megatron-core": installed("megatron-core"),
            "torch": torch.__version__,  # with the CUDA build, which the distribution on PyPI leaves out
            "transformers": installed("transformers"),
        },
    ):
        print(line)
    print(f"machine        {platform.machine()}")
    print(f"datasets       {installed('datasets')}")
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
        "mlflow": optional.mlflow(),
        "trackio": optional.trackio(),
        "pandas": optional.pandas(),
        "einops": optional.einops(),
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


def beside_tested(python: str, packages: Mapping[str, str]) -> list[str]:
    """A line for each version found, with those that the tests have run with on this Python.

    ``packages``: the installed versions by distribution.
    """
    row = row_of(python)
    tested = {} if row is None else {name.replace("_", "-"): value for name, value in asdict(row).items()}
    # On a Python of no row, what is tested at all.
    every = {
        name.replace("_", "-"): {str(getattr(each, name)) for each in TESTED} for name in asdict(TESTED[0])
    }
    found = {"python": python, **packages}
    lines = []
    for name, version_found in found.items():
        accepted = [tested[name]] if tested else sorted(every[name], key=Version)
        same = any(_is(version_found, each) for each in accepted)
        lines.append(
            f"{name:<14} {version_found:<14} {'tested' if same else 'tested: ' + ', '.join(accepted)}"
        )
    return lines


def _is(found: str, tested: str) -> bool:
    """Whether a version is the tested one: 3.12.1 is 3.12, and 2.13.0+cpu is 2.13.0."""
    public = found.partition("+")[0]
    return public == tested or (tested.count(".") == 1 and public.startswith(f"{tested}."))


def installed(package: str) -> str:
    """The version of an installed distribution, or that there is none."""
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"
