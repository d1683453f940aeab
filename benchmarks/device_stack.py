"""Device memory that the driver takes for good at the first call of each kernel, for its threads' stacks.

    python benchmarks/device_stack.py --out stack.json

The driver holds a stack for every thread that the device can run at a time, as large as the most demanding
kernel so far needs; it is no memory of torch's. Run it in a process that has not used the kernels before.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Annotated

import torch
import typer

from gapo_mega import ops

MIB = 1 << 20


def calls() -> dict[str, Callable[[], object]]:
    """One call of every kind; all tensors exist before, so that torch's cache has nothing to ask for."""
    rows = [torch.ones(1 << 16, device="cuda") for _ in range(2)]
    out = torch.empty_like(rows[0])
    weights = torch.ones(2, dtype=torch.float64, device="cuda")
    gram = torch.zeros(2, 2, dtype=torch.float64, device="cuda")
    found: dict[str, Callable[[], object]] = {
        "gramian": lambda: ops.gramian(rows, out=gram),
        "combine_": lambda: ops.combine_(out, rows, weights),
    }
    status = torch.zeros(1, dtype=torch.int32, device="cuda")
    for m in (3, 12):  # one thread a support set, and one thread in all
        given = torch.eye(m, dtype=torch.float64, device="cuda")
        receives = torch.empty(m, dtype=torch.float64, device="cuda")
        found[f"min_norm_ of {m} rows"] = lambda given=given, receives=receives: ops.min_norm_(
            receives, status, given
        )
    return found


def taken(call: Callable[[], object]) -> int:
    """Bytes of the device that are free before the call and not after it."""
    torch.cuda.synchronize()
    before = torch.cuda.mem_get_info()[0]
    call()
    torch.cuda.synchronize()
    return before - torch.cuda.mem_get_info()[0]


def main(
    out: Annotated[Path, typer.Option(help="JSON file")] = Path("runs/benchmarks/stack.json"),
) -> None:
    """Measure, print, write."""
    if not torch.cuda.is_available():
        typer.echo("error: no CUDA device", err=True)
        raise typer.Exit(2)
    properties = torch.cuda.get_device_properties(0)
    threads = properties.multi_processor_count * properties.max_threads_per_multi_processor
    first = {name: taken(call) for name, call in calls().items()}
    again = {name: taken(call) for name, call in calls().items()}
    record = {
        "device": properties.name,
        "torch": torch.__version__,
        "threads": threads,
        "first_call_bytes": first,
        "second_call_bytes": again,
        "bytes_per_thread": {name: size / threads for name, size in first.items()},
    }
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
    taken_by = ", ".join(f"{name} {size / MIB:.1f} MiB" for name, size in first.items())
    typer.echo(f"first calls on {properties.name} ({threads} threads): {taken_by}")


if __name__ == "__main__":
    typer.run(main)
