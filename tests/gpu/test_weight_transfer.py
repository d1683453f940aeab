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

import pytest
import torch
from torch import Tensor

from gapo_mega.rollout.servers.transfers.base import Piece
from gapo_mega.rollout.servers.transfers.ipc import collect, export
from gapo_mega.rollout.servers.transfers.nccl_library import Communicator, NcclLibrary, _UniqueId

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


def test_a_communicator_of_one_sends_and_ends() -> None:
    library = NcclLibrary()
    alone = Communicator(library, library.unique_id(), 1)
    alone.join()()
    packed = piece().packed()
    before = packed.clone()
    alone.broadcast(packed)()
    assert torch.equal(packed, before)
    alone.abort()
    alone.abort()  # has nothing to do


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_two_gpus_meet_and_one_gets_the_other_s_bytes() -> None:
    library = NcclLibrary()
    unique_id = library.unique_id()
    packed = piece().packed()
    found: list[Tensor] = []

    def receive() -> None:
        with torch.cuda.device(1):
            queue = ctypes.c_void_p(torch.cuda.current_stream().cuda_stream)
            handle = ctypes.c_void_p()
            library.call(
                "ncclCommInitRank", ctypes.byref(handle), 2, _UniqueId.from_buffer_copy(unique_id), 1
            )
            one = torch.zeros(1, device="cuda")
            library.call("ncclAllReduce", one.data_ptr(), one.data_ptr(), 1, 7, 0, handle, queue)
            got = torch.empty(packed.numel(), dtype=torch.uint8, device="cuda")
            library.call("ncclBroadcast", None, got.data_ptr(), got.numel(), 1, 0, handle, queue)
            torch.cuda.synchronize()
            found.append(got.cpu())
            library.call("ncclCommAbort", handle)

    receiver = threading.Thread(target=receive, daemon=True)
    receiver.start()
    with torch.cuda.device(0):
        sender = Communicator(library, unique_id, 2)
        sender.join()()
        sender.broadcast(packed)()
        receiver.join(60)
        sender.abort()
    assert found and torch.equal(found[0], packed.cpu())


def test_a_wait_for_ranks_that_never_come_is_left_behind() -> None:
    """Its thread hangs in NCCL's own start; what waits for it goes on, and so does the device."""
    library = NcclLibrary()
    lonely = Communicator(library, library.unique_id(), 2)
    thread = threading.Thread(target=lonely.join(), daemon=True)
    thread.start()
    thread.join(2.0)
    assert thread.is_alive()
    lonely.abort()
    assert float(torch.ones(3, device="cuda").sum()) == 3.0
