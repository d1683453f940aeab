"""The meeting of a job's processes: said beforehand, and explained where it fails."""

from __future__ import annotations

import logging
from datetime import timedelta
from itertools import count

import torch.distributed as dist
from torch.distributed.distributed_c10d import PrefixStore, Store

from gapo_mega.planning.meeting import meet
from gapo_mega.planning.world import read_world

logger = logging.getLogger(__name__)

TIMEOUT = timedelta(minutes=30)  # of the meeting, and of every collective, where nothing else is said
_started = count()  # groups of this process: every rank starts them in the same order


def start_process_group(backend: str, timeout: timedelta | None = None) -> None:
    """Start torch.distributed with the processes of the launcher's variables; alone it meets nobody.

    Says whom it waits for, where, and for how long, unless torchrun has seen to it that all are there.
    ``timeout``: of the meeting and of every collective; None: ``TIMEOUT``. Raises ``ValueError`` for
    variables that do not fit together (``read_world``), and where the others do not come in time.
    """
    limit = TIMEOUT if timeout is None else timeout
    world = read_world(to_meet=True)
    store: Store
    if world.address is None:
        store, rank, size = dist.HashStore(), 0, 1  # type: ignore[attr-defined]
    else:
        met = meet(world, limit, logger).store
        store, rank, size = PrefixStore(f"group/{next(_started)}", met), world.rank, world.size
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)
