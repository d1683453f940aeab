"""One rank of a launch: runs the jobs' check modules and writes rank 0's results."""

from __future__ import annotations

import importlib
import json
import os
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.distributed import worlds

_NAMES = ("checkpoint", "engine", "generation", "gradient", "supervised", "weights")
# Imported with this module, so that forked processes have them.
_CHECKS = {f"check_{name}": importlib.import_module(f"tests.distributed.check_{name}") for name in _NAMES}

Job = tuple[str, dict[str, Any]]
"""A check module's name and the arguments of its ``run``."""


def run_rank(rank: int, ranks: int, port: int, jobs: list[Job], results_file: Path) -> None:
    """Run ``jobs``. One that raises on every rank is reported and the next one runs."""
    log = os.open(results_file.with_name(f"rank{rank}of{ranks}.log"), os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # What torchrun sets.
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {
        "MASTER_ADDR": "localhost",
        "MASTER_PORT": str(port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    results: list[dict[str, Any]] = []
    for name, arguments in jobs:
        try:
            results.append({"result": _CHECKS[name].run(arguments)})
        except Exception:  # reported to the test, which fails with it
            results.append({"error": traceback.format_exc()})
            print(f"rank {rank}: {results[-1]['error']}", flush=True)
            worlds.leave()
    if rank == 0:
        results_file.write_text(json.dumps(results))
    worlds.leave()
    dist.destroy_process_group()
