"""Weights on their way from one GPU to another process, by the real NCCL and CUDA IPC.

vLLM itself is in an environment of its own; what its workers do is done here by hand.
"""

from __future__ import annotations

import base64
import ctypes
import pickle
import subprocess
import sys
import threading
import time
from collections.abc import Iterator

import pytest
import torch
from torch import Tensor

from gapo_mega.rollout.servers.transfers import nccl
from gapo_mega.rollout.servers.transfers.base import Piece
from gapo_mega.rollout.servers.transfers.ipc import collect, export
from gapo_mega.rollout.servers.transfers.nccl_library import (
    _MAGIC,
    _VERSION,
    Communicator,
    NcclLibrary,
    _Config,
    _UniqueId,
)

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device"),
]

# vLLM 0.32's packed_ipc_consumer: the GPU by its UUID, the reader's own index of it, and a copy.
READ = """\
import base64, pickle, sys
import torch
from torch.multiprocessing.reductions import rebuild_cuda_tensor

handles = pickle.loads(base64.b64decode(sys.stdin.read()))
arguments = list(handles[str(torch.cuda.get_device_properties(0).uuid)])
arguments[6] = 0
sys.stdout.buffer.write(bytes(rebuild_cuda_tensor(*arguments).clone().cpu().tolist()))
"""


def piece() -> Piece:
    source = torch.Generator("cuda").manual_seed(1)
    weight = torch.randn(300, 70, generator=source, device="cuda")
    return Piece.of({"a": weight.bfloat16()[:, 1:].t(), "b": weight, "c": weight[0, :1].half()})


def test_another_process_reads_a_piece_by_cuda_ipc() -> None:
    packed = piece().packed()
    handles = base64.b64encode(pickle.dumps(export(packed)))
    done = subprocess.run([sys.executable, "-c", READ], input=handles, capture_output=True, timeout=120)
    assert done.returncode == 0, done.stderr.decode()[-2000:]
    assert done.stdout == bytes(packed.tolist())
    collect()


def run(work: Iterator[None], seconds: float = 60.0) -> bool:
    """Whether it came to its end."""
    end = time.monotonic() + seconds
    for _ in work:
        if time.monotonic() > end:
            return False
        time.sleep(0.001)
    return True


def test_a_communicator_of_one_sends_and_ends() -> None:
    library = NcclLibrary()
    alone = Communicator(library, library.unique_id(), 1)
    assert run(alone.joining())
    packed = piece().packed()
    before = packed.clone()
    assert run(alone.sending(packed))
    assert torch.equal(packed, before)
    alone.abort()
    alone.abort()  # has nothing to do


def test_waits_for_ranks_that_never_come_are_given_up() -> None:
    library = NcclLibrary()
    lonely = [Communicator(library, library.unique_id(), 2) for _ in range(2)]
    assert not any(run(communicator.joining(), 2.0) for communicator in lonely)
    begun = time.monotonic()
    nccl._abort(lonely)
    assert time.monotonic() - begun < nccl._ABORTED_WITHIN
    assert float(torch.ones(3, device="cuda").sum()) == 3.0


class Peer:
    """Rank 1, on the second GPU, as vLLM's worker: calls that block, in a thread."""

    def __init__(self, library: NcclLibrary, unique_id: bytes, count: int, *, receives: bool = True) -> None:
        self._library, self._id, self._count, self._receives = library, unique_id, count, receives
        self._handle = ctypes.c_void_p()
        self.found: Tensor | None = None
        self.thread = threading.Thread(target=self._run, daemon=True)
        self.thread.start()

    def _run(self) -> None:
        call, handle = self._library.call, self._handle
        with torch.cuda.device(1):
            queue = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            unique_id = _UniqueId.from_buffer_copy(self._id)
            blocking = ctypes.byref(_Config(ctypes.sizeof(_Config), _MAGIC, _VERSION, 1))
            call("ncclCommInitRankConfig", ctypes.byref(handle), 2, unique_id, 1, blocking)
            one = torch.zeros(1, device="cuda")
            call("ncclAllReduce", one.data_ptr(), one.data_ptr(), 1, 7, 0, handle, queue)
            torch.cuda.synchronize()
            if self._receives:
                got = torch.empty(self._count, dtype=torch.uint8, device="cuda")
                call("ncclBroadcast", None, got.data_ptr(), got.numel(), 1, 0, handle, queue)
                torch.cuda.synchronize()
                self.found = got.cpu()

    def abort(self) -> None:
        self._library.call("ncclCommAbort", self._handle)


TWO = pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")


@TWO
def test_two_gpus_meet_and_one_gets_the_other_s_bytes() -> None:
    library = NcclLibrary()
    unique_id = library.unique_id()
    packed = piece().packed()
    peer = Peer(library, unique_id, packed.numel())
    sender = Communicator(library, unique_id, 2)
    assert run(sender.joining()) and run(sender.sending(packed))
    peer.thread.join(60)
    nccl._abort([sender])
    peer.abort()
    assert peer.found is not None and torch.equal(peer.found, packed.cpu())


@TWO
def test_broadcasts_that_hang_on_the_gpu_are_given_up_together() -> None:
    """Their kernels wait for peers that never ask; one alone would keep the other's end waiting."""
    library = NcclLibrary()
    packed = piece().packed()
    ids = [library.unique_id() for _ in range(2)]
    peers = [Peer(library, unique_id, packed.numel(), receives=False) for unique_id in ids]
    senders = [Communicator(library, unique_id, 2) for unique_id in ids]
    assert all([run(sender.joining()) for sender in senders])
    assert not any([run(sender.sending(packed), 2.0) for sender in senders])
    begun = time.monotonic()
    nccl._abort(senders)
    assert time.monotonic() - begun < nccl._ABORTED_WITHIN
    assert float(torch.ones(3, device="cuda").sum()) == 3.0
    for peer in peers:
        peer.abort()
