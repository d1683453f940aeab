"""Where this process stands in its job, before any engine is there to ask."""

from __future__ import annotations

import os


def world_size() -> int:
    """Processes of this job, as torchrun says; 1 without it."""
    return int(os.environ.get("WORLD_SIZE", "1"))


def is_main_rank() -> bool:
    """Whether this process speaks for its job."""
    return int(os.environ.get("RANK", "0")) == 0
