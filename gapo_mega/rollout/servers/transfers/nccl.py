"""Weights from GPU to GPUs: NCCL, vLLM's engine ``nccl``, packed.

A communicator a server and update: rank 0 is the run's, the others are the server's workers. So a server that
was restarted is like any other, and between updates none holds memory.
"""

from __future__ import annotations

import base64
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from gapo_mega.rollout.servers.client import VllmServer
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.transfers.base import By, Piece, Transfer, check_gpu
from gapo_mega.rollout.servers.transfers.nccl_library import Communicator, NcclError, NcclLibrary

# vLLM cuts what one request names into broadcasts of this many bytes. A piece is one: none has as many.
_NEVER_CUT = 1 << 62


@dataclass(frozen=True)
class _Link:
    server: VllmServer
    communicator: Communicator


class Nccl(Transfer):
    """One broadcast a piece and server, while the server's request for it is under way.

    Written against vLLM 0.32.
    """

    engine: ClassVar[str] = "nccl"
    _links: Sequence[_Link] = ()

    @classmethod
    def check_here(cls) -> None:
        check_gpu(cls.engine)
        NcclLibrary()

    @contextmanager
    def _session(self, servers: Sequence[VllmServer], by: By) -> Iterator[None]:
        links: list[_Link] = []
        self._links = links
        try:
            for server in servers:
                links.append(_Link(server, _joined(server, by())))
            yield
            for server in servers:
                server.leave(by())
        finally:
            # What hangs in a broadcast, on the GPU or in a thread, ends with its communicator.
            for link in links:
                link.communicator.abort()
            self._links = ()

    def _give(self, servers: Sequence[VllmServer], piece: Piece, end: float) -> None:
        packed, described = piece.packed(), piece.described()
        works = [work for link in self._links for work in _works(link, packed, described, end)]
        _together(works, end, "take weights by NCCL")


@dataclass(frozen=True)
class _Work:
    """Something that a server and this process do at the same time, each in a thread."""

    server: VllmServer
    do: Callable[[], None]


def _works(link: _Link, packed: Tensor, described: dict[str, Any], end: float) -> list[_Work]:
    return [
        _Work(link.server, lambda: link.server.take(described, end)),
        _Work(link.server, link.communicator.broadcast(packed)),
    ]


def _joined(server: VllmServer, end: float) -> Communicator:
    """A communicator with all workers of a server."""
    library = NcclLibrary()
    size, unique_id = 1 + server.world_size(end), library.unique_id()
    information = {
        "nccl_unique_id_b64": base64.b64encode(unique_id).decode(),
        "rank_offset": 1,
        "world_size": size,
        "packed": True,
        "packed_buffer_size_bytes": _NEVER_CUT,
        "packed_num_buffers": 1,
    }
    communicator = Communicator(library, unique_id, size)
    works = [
        _Work(server, lambda: server.join(information, end)),
        _Work(server, communicator.join()),
    ]
    try:
        _together(works, end, "meet this process by NCCL")
    except Exception:
        communicator.abort()
        raise
    return communicator


def _together(works: Sequence[_Work], end: float, what: str) -> None:
    """Do all at once. Raises the first error, or ``ServerLost`` where some are under way at the end."""
    futures = {_started(work.do): work.server.url for work in works}
    wait(futures, min(max(0.0, end - time.monotonic()), threading.TIMEOUT_MAX), FIRST_EXCEPTION)
    for future, url in futures.items():
        if future.done() and (error := future.exception()) is not None:
            if isinstance(error, NcclError):
                raise ServerLost(f"{url}: found that it did not {what}: {error}") from error
            raise error
    late = {url: None for future, url in futures.items() if not future.done()}
    if late:
        raise ServerLost(f"{', '.join(late)}: found that it did not {what} within rollout.vllm.timeout")


def _started(work: Callable[[], None]) -> Future[None]:
    """In a thread that no end of the process waits for: NCCL waits for its peers without a limit."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
