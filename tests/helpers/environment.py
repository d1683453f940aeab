"""How tests start commands of this package: the checkout's code, one thread a process, no GPU."""

from __future__ import annotations

import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SETTINGS = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": str(ROOT)}


def environment() -> dict[str, str]:
    """This process's, with these settings."""
    return {**os.environ, **SETTINGS}
