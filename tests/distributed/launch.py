"""Starts torchrun once for many checks: importing Megatron costs more than most of them."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

DRIVER = Path(__file__).with_name("driver.py")


def launch(
    ranks: int, jobs: list[tuple[str, dict[str, Any]]], folder: Path, timeout: int = 900
) -> list[dict[str, Any]]:
    """Rank 0's results of ``jobs`` (module below tests.distributed, arguments) on ``ranks`` processes."""
    jobs_file, results_file = folder / f"jobs{ranks}.json", folder / f"results{ranks}.json"
    # Jobs of one layout after the other: they share its process groups.
    order = sorted(range(len(jobs)), key=lambda index: _layout(jobs[index][1]))
    jobs_file.write_text(json.dumps([jobs[index] for index in order]))
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    command += [str(DRIVER), str(jobs_file), str(results_file)]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=timeout)
    if not results_file.exists():
        raise AssertionError(f"{ranks} ranks: no results\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
    results: list[dict[str, Any]] = json.loads(results_file.read_text())
    return [result for _, result in sorted(zip(order, results, strict=True), key=lambda pair: pair[0])]


def _layout(arguments: dict[str, Any]) -> tuple[int, int]:
    layout = arguments.get("layout", {})
    return layout.get("tensor", 1), layout.get("pipeline", 1)
