"""What servers are told of weights on GPUs, read by vLLM's own classes (no GPU is needed for that)."""

from __future__ import annotations

import base64
import json
import math
import os
import subprocess
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega.config import VllmConfig
from gapo_mega.rollout.servers.client import Patience, VllmServer
from gapo_mega.rollout.servers.transfers import ipc, nccl
from gapo_mega.rollout.servers.transfers.base import Piece
from gapo_mega.rollout.servers.transfers.registry import TRANSFERS
from tests.helpers.emulated_nccl import GROUPS, EmulatedCommunicator, EmulatedLibrary

PYTHON = os.environ.get("GAPO_VLLM_PYTHON")
pytestmark = pytest.mark.skipif(PYTHON is None, reason="make test-vllm has a vLLM")

# The same tensors as ``PIECE``, from what vLLM reads of the messages.
READ = """\
import json, math, sys
import torch
from vllm.distributed.weight_transfer.ipc_engine import IPCWeightTransferInitInfo, IPCWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.nccl_common import NCCLWeightTransferInitInfo
from vllm.distributed.weight_transfer.nccl_engine import NCCLWeightTransferUpdateInfo
from vllm.distributed.weight_transfer.packed_tensor import packed_nccl_broadcast_consumer, unpack_tensor

told = json.load(open(sys.argv[1]))
packed = torch.tensor(told["bytes"], dtype=torch.uint8)
init = NCCLWeightTransferInitInfo(**told["nccl"]["init"])
assert len(init.nccl_unique_id_bytes) == 128 and (init.rank_offset, init.world_size) == (1, 3)
update = NCCLWeightTransferUpdateInfo(**told["nccl"]["update"])
assert init.packed
types = [getattr(torch, name) for name in update.dtype_names]
sizes = [math.prod(shape) * dtype.itemsize for shape, dtype in zip(update.shapes, types)]
assert sum(sizes) == len(packed) <= init.packed_buffer_size_bytes
found = dict(unpack_tensor(packed, update.names, update.shapes, types, sizes))
assert IPCWeightTransferInitInfo(**told["ipc"]["init"]).packed
update = IPCWeightTransferUpdateInfo(**told["ipc"]["update"])
assert update.ipc_handles == {"GPU-1": ("a handle", 7)}, update.ipc_handles
types = [getattr(torch, name) for name in update.dtype_names]
again = dict(unpack_tensor(packed, update.names, update.shapes, types, update.tensor_sizes))
for name, tensor in found.items():
    assert torch.equal(tensor, again[name])
torch.save({name: tensor.clone() for name, tensor in found.items()}, sys.argv[2])
"""
PIECE = Piece.of(  # 14 bytes come before those of four
    {
        "b.bias": torch.arange(7, dtype=torch.bfloat16),
        "a.weight": torch.randn(3, 5, generator=torch.Generator().manual_seed(1)).t(),
        "c": torch.tensor(2.5, dtype=torch.float16),
    }
)


class Noting(VllmServer):
    """Two workers that agree to everything."""

    def __init__(self) -> None:
        super().__init__("http://127.0.0.1:1", Patience(5, 5, 5))
        self.init: Mapping[str, Any] = {}
        self.update: Mapping[str, Any] = {}
        self.workers = 2

    def world_size(self, end: float) -> int:
        return self.workers

    def join(self, information: Mapping[str, Any], end: float) -> None:
        self.init = information
        if "nccl_unique_id_b64" in information:
            group = GROUPS[base64.b64decode(information["nccl_unique_id_b64"])]
            group.enter(1, 3)
            group.join(2, 3)

    def take(self, update: Mapping[str, Any], end: float) -> None:
        self.update = update

    def leave(self, end: float) -> None:
        pass


class Sending(EmulatedCommunicator):
    def sending(self, packed: Any) -> Iterator[None]:
        return iter(())


def test_vllm_reads_what_its_servers_are_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(nccl, "NcclLibrary", EmulatedLibrary)
    monkeypatch.setattr(nccl, "Communicator", Sending)
    monkeypatch.setattr(ipc, "export", lambda packed: {"GPU-1": ("a handle", 7)})
    monkeypatch.setattr(ipc, "collect", lambda: None)
    told: dict[str, Any] = {"bytes": PIECE.packed().tolist()}
    for name, workers in (("nccl", 2), ("ipc", 1)):
        server = Noting()
        server.workers = workers
        transfer = TRANSFERS[name](VllmConfig(url=server.url))
        with transfer._session([server], math.inf):
            transfer._give([server], PIECE, math.inf)
        told[name] = {"init": server.init, "update": server.update}
    (tmp_path / "told.json").write_text(json.dumps(told))
    assert PYTHON is not None
    environment = {"PATH": "/usr/bin:/bin", **TRANSFERS["ipc"](VllmConfig()).environment()}
    done = subprocess.run(
        [PYTHON, "-c", READ, str(tmp_path / "told.json"), str(tmp_path / "found.pt")],
        env=environment,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    found = torch.load(tmp_path / "found.pt")
    assert list(found) == list(PIECE.tensors)
    for name, tensor in PIECE.tensors.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor)
