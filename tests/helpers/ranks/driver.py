"""One rank of a launch: runs the jobs' check modules and writes rank 0's results."""

from __future__ import annotations

import importlib
import json
import os
import time
import traceback
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.helpers.ranks import worlds

_NAMES = (
    "answering",
    "assumptions",
    "averages",
    "checkpoint",
    "combination",
    "engine",
    "experts",
    "generation",
    "gradient",
    "layouts",
    "memory",
    "methods",
    "one_pass",
    "policy",
    "rollouts",
    "supervised",
    "weights",
)
# Imported with this module, so that forked processes have them.
_CHECKS = {f"check_{name}": importlib.import_module(f"tests.helpers.ranks.check_{name}") for name in _NAMES}

Job = tuple[str, dict[str, Any]]
"""A check module's name and the arguments of its ``run``."""


def run_rank(rank: int, ranks: int, port: int, jobs: list[Job], results_file: Path) -> None:
    """Run ``jobs``. One that raises on every rank is reported and the next one runs.

    Rank 0 adds a line of JSON to ``results_file`` after every job: a crash or a time limit leaves what was
    done.
    """
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
    for name, arguments in jobs:
        begin = time.perf_counter()
        outcome: dict[str, Any]
        try:
            outcome = {"result": _CHECKS[name].run(arguments)}
        except Exception:  # reported to the test, which fails with it
            outcome = {"error": traceback.format_exc()}
            print(f"rank {rank}: {outcome['error']}", flush=True)
            worlds.leave()
        if rank == 0:
            with results_file.open("a") as file:
                file.write(json.dumps({**outcome, "seconds": time.perf_counter() - begin}) + "\n")
    worlds.leave()
    dist.destroy_process_group()
