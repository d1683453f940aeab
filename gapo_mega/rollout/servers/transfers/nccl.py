"""Weights from GPU to GPUs: NCCL, vLLM's engine ``nccl``, packed.

A communicator a server and update: rank 0 is the run's, the others are the server's workers. So a server that
was restarted is like any other, and between updates none holds memory.
"""

from __future__ import annotations

import base64
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, wait
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

from gapo_mega.config import Config
from gapo_mega.rollout.servers.client import VllmServer
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.transfers.base import Piece, Transfer, check_gpu
from gapo_mega.rollout.servers.transfers.nccl_library import Communicator, NcclError, NcclLibrary

logger = logging.getLogger(__name__)

# vLLM cuts what one request names into broadcasts of this many bytes. A piece is one: none has as many.
_NEVER_CUT = 1 << 62
_BETWEEN_LOOKS = 0.0005  # seconds
_ABORTED_WITHIN = 10.0  # seconds
_DEVICES = "CUDA_VISIBLE_DEVICES"


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
    def check(cls, config: Config) -> None:
        vllm = config.rollout.vllm
        if vllm.python is not None and _DEVICES not in vllm.environment:
            raise ValueError(
                f"rollout.vllm.transfer: found nccl without {_DEVICES} in rollout.vllm.environment, "
                "accepted: with GPUs that the trainer does not use (NCCL takes no GPU twice)"
            )

    @classmethod
    def check_here(cls) -> None:
        check_gpu(cls.engine)
        NcclLibrary()

    @contextmanager
    def _session(self, servers: Sequence[VllmServer], end: float) -> Iterator[None]:
        links: list[_Link] = []
        self._links = links
        try:
            for server in servers:
                _join(server, end, links)
            yield
        finally:
            _abort([link.communicator for link in links])
            self._links = ()
        for server in servers:
            _leave(server, end)

    def _give(self, servers: Sequence[VllmServer], piece: Piece, end: float) -> None:
        packed, described = piece.packed(), piece.described()
        shares = [
            _Share(link.server, partial(link.server.take, described, end), link.communicator.sending(packed))
            for link in self._links
        ]
        _together(shares, end, "take weights by NCCL")


@dataclass(frozen=True)
class _Share:
    """What a server is asked to do in one request, and what NCCL does here at the same time."""

    server: VllmServer
    ask: Callable[[], None]
    here: Iterator[None]


def _join(server: VllmServer, end: float, links: list[_Link]) -> None:
    """Meet all workers of a server. The communicator is in ``links`` before anything is waited for."""
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
    links.append(_Link(server, communicator))
    share = _Share(server, partial(server.join, information, end), communicator.joining())
    _together([share], end, "meet this process by NCCL")


def _leave(server: VllmServer, end: float) -> None:
    """Its weights are there; a server that lets go of nothing does so at the next update."""
    try:
        server.leave(end)
    except (ServerLost, ValueError) as error:
        logger.warning("%s (after its weights were taken)", error)


def _together(shares: Sequence[_Share], end: float, what: str) -> None:
    """Do all of it at once. Raises the first error, and ``ServerLost`` at the end of the time."""
    asked = [(_started(share.ask), share.server.url) for share in shares]
    open_here = {share.server.url: share.here for share in shares}
    while True:
        for future, _ in asked:
            if future.done():
                future.result()
        for url, here in list(open_here.items()):
            if _is_done(here, url, what):
                del open_here[url]
        late = dict.fromkeys([*(url for future, url in asked if not future.done()), *open_here])
        if not late:
            return
        if time.monotonic() > end:
            raise ServerLost(f"{', '.join(late)}: found that it did not {what} within rollout.vllm.timeout")
        time.sleep(_BETWEEN_LOOKS)


def _is_done(here: Iterator[None], url: str, what: str) -> bool:
    try:
        next(here)
    except StopIteration:
        return True
    except NcclError as error:
        if error.refused:
            raise ValueError(f"rollout.vllm.transfer: {url} does not {what}: {error}") from error
        raise ServerLost(f"{url}: found that it did not {what}: {error}") from error
    return False


def _abort(communicators: Sequence[Communicator]) -> None:
    """All at once: each waits for the device, which a broadcast of another one may hold."""
    futures = [_started(communicator.abort) for communicator in communicators]
    done, late = wait(futures, _ABORTED_WITHIN)
    for future in done:
        if (error := future.exception()) is not None:
            logger.warning("a communicator with a server does not end: %s", error)
    if late:
        logger.warning("%d communicators with servers did not end in %g s", len(late), _ABORTED_WITHIN)


def _started(work: Callable[[], None]) -> Future[None]:
    """In a thread that no end of the process waits for."""
    future: Future[None] = Future()

    def run() -> None:
        try:
            work()
            future.set_result(None)
        except Exception as error:
            future.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return future
