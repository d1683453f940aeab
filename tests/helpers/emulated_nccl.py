"""NCCL among threads of one process: who meets whom, waits without a limit, and what ends such a wait."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
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

    def join(self, rank: int, size: int) -> None:
        with self.condition:
            assert rank not in self.sizes
            self.sizes[rank] = size
            self._wait(lambda: len(self.sizes) == size)
            assert set(self.sizes.values()) == {size} and set(self.sizes) == set(range(size))

    def send(self, content: bytes) -> None:
        """As rank 0 of two."""
        with self.condition:
            assert self.sent is None
            self.sent = content
            self._wait(lambda: self.sent is None)

    def receive(self, count: int) -> bytes:
        """As rank 1 of two."""
        with self.condition:
            self._wait(lambda: self.sent is not None)
            found, self.sent = self.sent, None
            self.condition.notify_all()
        assert found is not None and len(found) == count, "NCCL takes what comes for what it waits for"
        return found

    def abort(self) -> None:
        with self.condition:
            self.aborted = True
            self.condition.notify_all()

    def _wait(self, until: Callable[[], bool]) -> None:
        self.condition.notify_all()
        self.condition.wait_for(lambda: until() or self.aborted)
        if self.aborted and not until():
            raise NcclError("aborted")


GROUPS: dict[bytes, Group] = {}


class EmulatedLibrary:
    """In place of ``NcclLibrary``."""

    def unique_id(self) -> bytes:
        made = os.urandom(128)
        GROUPS[made] = Group()
        return made


class EmulatedCommunicator:
    """In place of ``Communicator``, rank 0. Keeps all that there ever were in ``made``."""

    made: ClassVar[list[EmulatedCommunicator]] = []

    def __init__(self, library: Any, unique_id: bytes, size: int) -> None:
        self.group, self.size = GROUPS[unique_id], size
        self.made.append(self)

    def join(self) -> Callable[[], None]:
        return lambda: self.group.join(0, self.size)

    def broadcast(self, packed: Tensor) -> Callable[[], None]:
        return lambda: self.group.send(packed.numpy().tobytes())

    def abort(self) -> None:
        self.group.abort()
