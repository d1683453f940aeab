"""Where this process stands in its job, before any engine is there to ask, and what its ranks agree on."""

from __future__ import annotations

import json
import logging
import os
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from itertools import count
from pathlib import Path
from typing import Any, Protocol

from gapo_mega.planning.world import read_world
from gapo_mega.runs.own_watch import OwnWatch
from gapo_mega.runs.watch import Watch, end_process
from gapo_mega.whereabouts import LostPeersError, here

logger = logging.getLogger(__name__)

PATIENCE = timedelta(minutes=30)
# What gloo says where another rank does not answer, or has gone.
_OF_GLOO = (
    "gloo",
    "Connection closed by peer",
    "Connection reset by peer",
    "Timed out waiting",
    "caused pair closure",
)


def world_size() -> int:
    """Processes of this job, as torchrun says; 1 without it. Raises ``ValueError`` as ``read_world`` does."""
    return read_world().size


def is_main_rank() -> bool:
    """Whether this process speaks for its job. Raises ``ValueError`` as ``read_world`` does."""
    return read_world().rank == 0


def is_first_here() -> bool:
    """Whether this process is the first of its job on this machine. Raises ``ValueError`` likewise."""
    return read_world().local_rank == 0


class Peers(Protocol):
    """All processes of the job, before they have process groups. Every rank makes the same calls."""

    rank: int
    size: int
    is_main: bool

    def gather(self, value: Any) -> list[Any]:
        """Every rank's ``value``, which JSON can hold, in rank order."""
        ...

    def leave(self, value: Any, seconds: float) -> list[Any]:
        """As ``gather``, once and at any moment; None for ranks that do not come within ``seconds``."""
        ...


class Alone:
    """The one process of its job."""

    rank, size = 0, 1
    is_main = True

    def gather(self, value: Any) -> list[Any]:
        return [value]

    def leave(self, value: Any, seconds: float) -> list[Any]:
        return [value]


class Job:
    """The ranks of a torchrun job. They talk through its store, and start no process group."""

    _made = count()  # in this process: every rank makes them in the same order

    def __init__(self, patience: timedelta = PATIENCE) -> None:
        """``patience``: how long ranks wait for one another. Raises ``ValueError`` where some do not come."""
        from torch.distributed.distributed_c10d import PrefixStore

        from gapo_mega.planning.meeting import meet

        world = read_world(to_meet=True)
        self.rank, self.size, self._patience = world.rank, world.size, patience
        met = meet(world, patience, logger)
        self.lasting = met.lasting
        self._store = PrefixStore(f"job/{next(self._made)}", met.store)
        self._rounds = count()
        self._watch: Watch | None = None
        self.is_main = self.rank == 0

    def gather(self, value: Any) -> list[Any]:
        number = next(self._rounds)
        self._store.set(f"{number}/{self.rank}", json.dumps(value))
        values = [json.loads(self._read(f"{number}/{rank}", rank)) for rank in range(self.size)]
        self._store.set(f"{number}/read/{self.rank}", "")
        if self.is_main:  # whose process may hold the store, and may be about to end
            for rank in range(self.size):
                self._read(f"{number}/read/{rank}", rank)
            # Nobody asks for them again, and a long run would fill the memory of rank 0's host.
            for rank in range(self.size):
                self._store.delete_key(f"{number}/{rank}")
                self._store.delete_key(f"{number}/read/{rank}")
        return values

    def _read(self, key: str, rank: int) -> bytes:
        """What ``rank`` writes there. Raises ``LostPeersError`` where it does not come."""
        from torch.distributed import DistError

        try:
            self._store.wait([key], self._patience)
            found: bytes = self._store.get(key)
        except DistError as error:
            raise LostPeersError(
                f"rank {self.rank} waited for rank {rank} in {here()}, at most "
                f"{self._patience / timedelta(minutes=1):g} minutes ({str(error).splitlines()[0][:200]})"
            ) from error
        return found

    def leave(self, value: Any, seconds: float) -> list[Any]:
        from torch.distributed import DistError, DistStoreError

        end = time.monotonic() + seconds
        values: list[Any] = [None] * self.size
        try:
            self._store.set(f"leaving/{self.rank}", json.dumps(value))
            for rank in range(self.size):
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

    def watch(self, silence: timedelta) -> None:
        """Give signs of life, and end this process where others give none for so long."""
        assert self._watch is None
        self._watch = Watch(self._store, self.rank, self.size, silence)
        self._watch.start()

    def unwatch(self, error: BaseException | None = None) -> None:
        """Stop it; ``error``: what ends this process, for the others."""
        if self._watch is None:
            return
        reason = None if error is None else f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
        told = f"rank {self.rank} on {socket.gethostname()} failed in {here()}: {reason}"
        self._watch.stop(None if reason is None else told)
        self._watch = None

    def give_up(self, finding: str) -> None:
        """End this process because of ``finding``, which the others are told."""
        if self._watch is None:
            end_process(f"{finding}; this process ends")
        else:
            self._watch.leave(finding)

    def explain(self, error: Exception) -> str:
        """What to say where a collective has failed with ``error``."""
        if self._watch is None:
            return f"rank {self.rank} lost the others in {here()}: {error}"
        return self._watch.explain(error, here())


def peers(patience: timedelta = PATIENCE) -> Peers:
    """The processes of this job; ``patience``: how long they wait for one another."""
    return Alone() if world_size() == 1 else Job(patience)


def has_begun(everyone: Peers, directory: Path) -> bool:
    """Whether an earlier attempt of this job has begun in ``directory``: torchrun has started it again.

    Agents count restarts each for itself, and one that starts because others have failed counts none.
    """
    restarted = int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")) > 0
    if isinstance(everyone, Job):
        restarted = restarted or everyone.lasting.check([_begun(directory)])
    return any(everyone.gather(restarted))


def note_begun(everyone: Peers, directory: Path) -> None:
    """Let later attempts of this job know."""
    if isinstance(everyone, Job) and everyone.is_main:
        everyone.lasting.set(_begun(directory), "")


def _begun(directory: Path) -> str:
    return f"begun/{directory}"


@contextmanager
def watched(everyone: Peers, silence: timedelta, phase: timedelta | None = None) -> Iterator[None]:
    """Within: ranks that are silent for so long end the others. Collectives that fail name who is missing.

    ``phase``: after which a rank ends that does not get on; None: never.
    """
    own = None if phase is None else OwnWatch(everyone.rank, phase, _ending(everyone))
    if own is not None:
        own.start()
    try:
        with _watched(everyone, silence):
            yield
    finally:
        if own is not None:
            own.stop()


def _ending(everyone: Peers) -> Callable[[str], None]:
    """Ends this process, told why; the others hear of it where there are some."""

    def end(message: str) -> None:
        if isinstance(everyone, Job):
            everyone.give_up(message)
        else:
            end_process(f"{message}; this process ends")

    return end


@contextmanager
def _watched(everyone: Peers, silence: timedelta) -> Iterator[None]:
    if not isinstance(everyone, Job):
        yield
        return
    everyone.watch(silence)
    try:
        with naming_the_lost(everyone):
            yield
    except BaseException as error:
        everyone.unwatch(error)
        raise
    everyone.unwatch()


@contextmanager
def naming_the_lost(everyone: Peers) -> Iterator[None]:
    """Within: an error of a collective becomes a ``LostPeersError`` that says who waited where for whom."""
    try:
        yield
    except RuntimeError as error:
        if not isinstance(everyone, Job) or not _is_of_a_collective(error):
            raise
        raise LostPeersError(everyone.explain(error)) from error


def _is_of_a_collective(error: RuntimeError) -> bool:
    """Torch has a type for NCCL's and its store's errors, and none for gloo's."""
    from torch.distributed import DistError

    return isinstance(error, DistError) or (
        type(error) is RuntimeError and any(words in str(error) for words in _OF_GLOO)
    )


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
