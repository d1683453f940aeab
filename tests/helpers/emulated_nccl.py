"""NCCL among threads of one process: who meets whom, waits without a limit, and what ends such a wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable, Iterator
from typing import Any, ClassVar

from torch import Tensor

from gapo_mega.rollout.servers.transfers.nccl_library import NcclError


class Group:
    """The ranks of one unique id."""

    def __init__(self) -> None:
        self.condition = threading.Condition()
        self.sizes: dict[int, int] = {}  # by rank, what each takes for the number of all
        self.sent: bytes | None = None
        self.aborted = False

    def enter(self, rank: int, size: int) -> None:
        with self.condition:
            assert rank not in self.sizes
            self.sizes[rank] = size
            self.condition.notify_all()

    def is_whole(self) -> bool:
        (size,) = set(self.sizes.values())
        whole = len(self.sizes) == size
        assert not whole or set(self.sizes) == set(range(size))
        return whole

    def send(self, content: bytes) -> None:
        """As rank 0 of two, which does not wait here."""
        with self.condition:
            assert self.sent is None
            self.sent = content
            self.condition.notify_all()

    def join(self, rank: int, size: int) -> None:
        """As another rank, which waits."""
        self.enter(rank, size)
        self._wait(self.is_whole)

    def receive(self, count: int) -> bytes:
        """As rank 1 of two, which waits."""
        self._wait(lambda: self.sent is not None)
        found, self.sent = self.sent, None
        assert found is not None and len(found) == count, "NCCL takes what comes for what it waits for"
        return found

    def abort(self) -> None:
        with self.condition:
            self.aborted = True
            self.condition.notify_all()

    def _wait(self, until: Callable[[], bool]) -> None:
        with self.condition:
            self.condition.wait_for(lambda: until() or self.aborted)
            if not until():
                raise NcclError("aborted")


GROUPS: dict[bytes, Group] = {}


class EmulatedLibrary:
    """In place of ``NcclLibrary``."""

    def unique_id(self) -> bytes:
        made = os.urandom(128)
        GROUPS[made] = Group()
        return made


class EmulatedCommunicator:
    """In place of ``Communicator``, rank 0. Keeps all that there ever were in ``made``.

    Attributes:
        error: what every look at it raises.
    """

    made: ClassVar[list[EmulatedCommunicator]] = []
    error: ClassVar[NcclError | None] = None

    def __init__(self, library: Any, unique_id: bytes, size: int) -> None:
        self.group, self.size = GROUPS[unique_id], size
        self.made.append(self)

    def joining(self) -> Iterator[None]:
        self.group.enter(0, self.size)
        yield from self._until(self.group.is_whole)

    def sending(self, packed: Tensor) -> Iterator[None]:
        self.group.send(packed.numpy().tobytes())
        yield from self._until(lambda: self.group.sent is None)

    def abort(self) -> None:
        self.group.abort()

    def _until(self, done: Callable[[], bool]) -> Iterator[None]:
        while not done():
            if self.error is not None:
                raise self.error
            yield
