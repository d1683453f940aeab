"""Writes a checkpoint of a tiny run, or loads one that another release of Megatron-core has written.

python -m tests.helpers.exchange write DIRECTORY
python -m tests.helpers.exchange read DIRECTORY
"""

from __future__ import annotations

import math
import sys
from pathlib import Path

import torch
import torch.distributed as dist

from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from tests.helpers.ranks import worlds
from tests.helpers.ranks.check_checkpoint import Run

_SUMS = "sums.pt"  # beside the checkpoint, by plain torch
# The same fp32 numbers are read back, and summed in fp64.
_TOLERANCE = 1e-12


def write(directory: Path) -> None:
    """Take two steps and save; what was saved is described beside the checkpoint."""
    alone = worlds.enter(1, 1)
    run = Run({"dtype": "bf16"}, alone, seed=1)
    for seed in range(2):
        run.step(seed)
    checkpoint.save(directory, run.trainables, {"written": True}, alone)
    torch.save({"sums": run.fingerprint(), "next": run.step(2)}, directory / _SUMS)


def read(directory: Path) -> None:
    """Load into other weights, compare every tensor of model and optimizer, and take the next step."""
    alone = worlds.enter(1, 1)
    run = Run({"dtype": "bf16"}, alone, seed=2)
    assert checkpoint.load(directory, run.trainables, alone) == {"written": True}
    expected = torch.load(directory / _SUMS)
    found = run.fingerprint()
    assert found.keys() == expected["sums"].keys()
    for name, numbers in expected["sums"].items():
        assert all(
            math.isclose(a, b, rel_tol=_TOLERANCE, abs_tol=1e-30)
            for a, b in zip(found[name], numbers, strict=True)
        ), name
    # Two releases may round the step in bf16 differently, by about 1e-3.
    assert math.isclose(run.step(2), expected["next"], rel_tol=1e-2)


if __name__ == "__main__":
    {"write": write, "read": read}[sys.argv[1]](Path(sys.argv[2]))
    worlds.leave()
    dist.destroy_process_group()
