"""A step of tools/gpu_check.sh: is there a device, and do the compiled kernels run on it?"""

from __future__ import annotations

import sys

import torch

from gapo_mega import ops


def main() -> int:
    """Print what was found; the exit status tells whether the kernels can be tried."""
    if not torch.cuda.is_available():
        print(f"torch {torch.__version__} with CUDA {torch.version.cuda}: no CUDA device")
        return 1
    faults = []
    for index in range(torch.cuda.device_count()):
        properties = torch.cuda.get_device_properties(index)
        fault = ops.fault_of(torch.device("cuda", index))
        faults.append(fault)
        print(
            f"{properties.name}, sm_{properties.major}{properties.minor}, "
            f"{properties.multi_processor_count} multiprocessors, {properties.total_memory / 2**30:.0f} GiB: "
            f"{fault or 'kernels load'}"
        )
    return 1 if any(faults) else 0


if __name__ == "__main__":
    sys.exit(main())
