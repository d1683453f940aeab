"""The meeting of a job's processes: said beforehand, and explained where it fails."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist

from gapo_mega.planning.world import World, read_world

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)  # of the meeting, and of every collective


def start_process_group(backend: str) -> None:
    """Start torch.distributed with the processes of the launcher's variables; alone it meets nobody.

    Says whom it waits for, where, and for how long, unless torchrun has seen to it that all are there.
    Raises ``ValueError`` for variables that do not fit together (``read_world``), and where the others do not
    come within ``TIMEOUT``.
    """
    world = read_world(to_meet=True)
    if world.address is None:
        store = dist.HashStore()  # type: ignore[attr-defined]
        dist.init_process_group(backend, store=store, rank=0, world_size=1, timeout=TIMEOUT)
        return
    if not dist.is_torchelastic_launched():
        logger.warning("%s", waiting_for(world))
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise ValueError(
            f"MASTER_ADDR, MASTER_PORT: rank {world.rank} of {world.size} did not meet {world.others} at "
            f"{world.address} ({reason}), accepted: all processes of the job, there within {_minutes()}"
        ) from error


def waiting_for(world: World) -> str:
    """Whom a process waits for, where, how long, and what to do if nobody is meant."""
    return (
        f"rank {world.rank} of {world.size} waits for {world.others} at {world.address}, at most "
        f"{_minutes()} (RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT say so; for one process, unset RANK "
        "and WORLD_SIZE)"
    )


def _minutes() -> str:
    return f"{TIMEOUT.total_seconds() / 60:g} minutes"
