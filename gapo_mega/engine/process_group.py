"""The meeting of a job's processes: said beforehand, and explained where it fails."""

from __future__ import annotations

import logging
from datetime import timedelta

import torch.distributed as dist

from gapo_mega.planning.world import did_not_meet, read_world, waiting_for

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
        logger.warning("%s", waiting_for(world, TIMEOUT))
    try:
        dist.init_process_group(backend, timeout=TIMEOUT)
    except (dist.DistNetworkError, dist.DistStoreError) as error:
        raise ValueError(did_not_meet(world, error, TIMEOUT)) from error
