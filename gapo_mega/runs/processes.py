"""Where this process stands in its job, before any engine is there to ask."""

from __future__ import annotations

from gapo_mega.planning.world import read_world


def world_size() -> int:
    """Processes of this job, as torchrun says; 1 without it. Raises ``ValueError`` as ``read_world`` does."""
    return read_world().size


def is_main_rank() -> bool:
    """Whether this process speaks for its job. Raises ``ValueError`` as ``read_world`` does."""
    return read_world().rank == 0
