"""Where this process stands in its job, before any engine is there to ask, and what its ranks agree on."""

from __future__ import annotations

import json
import logging
import os
import time
import uuid
from collections.abc import Callable
from datetime import timedelta
from itertools import count
from typing import Any, Protocol

from gapo_mega.planning.world import did_not_meet, read_world, waiting_for

logger = logging.getLogger(__name__)

_PATIENCE = timedelta(minutes=30)


def world_size() -> int:
    """Processes of this job, as torchrun says; 1 without it. Raises ``ValueError`` as ``read_world`` does."""
    return read_world().size


def is_main_rank() -> bool:
    """Whether this process speaks for its job. Raises ``ValueError`` as ``read_world`` does."""
    return read_world().rank == 0


def is_restart() -> bool:
    """Whether torchrun has started this process again after a failure."""
    return int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0


class Peers(Protocol):
    """All processes of the job, before they have process groups. Every rank makes the same calls."""

    is_main: bool

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, which JSON can hold, in rank order."""
        ...

    def leave(self, value: Any, seconds: float) -> list[Any]:
        """As ``gather``, once and at any moment; None for ranks that do not come within ``seconds``."""
        ...


class Alone:
    """The one process of its job."""

    is_main = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def leave(self, value: Any, seconds: float) -> list[Any]:
        return [value]


class Job:
    """The ranks of a torchrun job. They talk through its store, and start no process group."""

    _made = count()  # in this process: every rank makes them in the same order

    def __init__(self) -> None:
        import torch.distributed as dist
        from torch.distributed import distributed_c10d
        from torch.distributed.rendezvous import rendezvous

        world = read_world(to_meet=True)
        if not dist.is_torchelastic_launched():
            logger.warning("%s", waiting_for(world, _PATIENCE))
        try:
            store, self._rank, self._world = next(rendezvous("env://", timeout=_PATIENCE))
        except (dist.DistNetworkError, dist.DistStoreError) as error:
            raise ValueError(did_not_meet(world, error, _PATIENCE)) from error
        # The store outlives a restart of the workers.
        attempt = os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")
        self._store = distributed_c10d.PrefixStore(f"gapo-mega/{attempt}/{next(self._made)}", store)
        self._rounds = count()
        self.is_main = self._rank == 0

    def gather(self, value: Any) -> list[Any]:
        number = next(self._rounds)
        self._store.set(f"{number}/{self._rank}", json.dumps(value))
        values = [json.loads(self._store.get(f"{number}/{rank}")) for rank in range(self._world)]
        self._store.set(f"{number}/read/{self._rank}", "")
        if self.is_main:  # whose process may hold the store, and may be about to end
            read = [f"{number}/read/{rank}" for rank in range(self._world)]
            self._store.wait(read, _PATIENCE)
            # Nobody asks for them again, and a long run would fill the memory of rank 0's host.
            for key in [*read, *(f"{number}/{rank}" for rank in range(self._world))]:
                self._store.delete_key(key)
        return values

    def leave(self, value: Any, seconds: float) -> list[Any]:
        from torch.distributed import DistError, DistStoreError

        end = time.monotonic() + seconds
        values: list[Any] = [None] * self._world
        try:
            self._store.set(f"leaving/{self._rank}", json.dumps(value))
            for rank in range(self._world):
                # At least a moment, for those that came meanwhile.
                left = timedelta(seconds=max(0.1, end - time.monotonic()))
                try:
                    self._store.wait([f"leaving/{rank}"], left)
                except DistStoreError:  # not within the time
                    continue
                values[rank] = json.loads(self._store.get(f"leaving/{rank}"))
        except (DistError, RuntimeError) as error:  # the store has gone with its process
            logger.warning("the ranks cannot agree any more: %s", error)
        return values


def peers() -> Peers:
    """The processes of this job."""
    return Alone() if world_size() == 1 else Job()


def place_of(everyone: Peers) -> tuple[int, int]:
    """This process's rank among ``everyone``, and how many they are. Collective."""
    own = uuid.uuid4().hex
    all_of_them = everyone.gather(own)
    return all_of_them.index(own), len(all_of_them)


def agree(everyone: Peers, check: Callable[[], None]) -> None:
    """Run ``check`` on every rank. Where some raise ``ValueError``, all raise that of the first."""
    error: str | None = None
    try:
        check()
    except ValueError as found:
        error = str(found)
    first = next((found for found in everyone.gather(error) if found is not None), None)
    if first is not None:
        raise ValueError(first)
