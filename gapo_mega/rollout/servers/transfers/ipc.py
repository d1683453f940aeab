"""Weights in memory of a GPU that trainer and server share: CUDA IPC, vLLM's engine ``ipc``, packed."""

from __future__ import annotations

import base64
import os
import pickle
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.multiprocessing.reductions import reduce_tensor

from gapo_mega.config import Config
from gapo_mega.rollout.servers.client import VllmServer
from gapo_mega.rollout.servers.transfers.base import Piece, Transfer, check_gpu, is_here

_OF_THE_ALLOCATOR = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF")


class Ipc(Transfer):
    """A server's one worker maps the packed piece of rank 0's GPU, and copies from it.

    Written against vLLM 0.32.
    """

    engine: ClassVar[str] = "ipc"

    @classmethod
    def check(cls, config: Config) -> None:
        for url in config.rollout.vllm.urls:
            if not is_here(url):
                raise ValueError(
                    f"rollout.vllm.transfer: found ipc with rollout.vllm.url {url}, accepted: nccl or files "
                    "(no memory is shared with another machine)"
                )

    @classmethod
    def check_here(cls) -> None:
        check_gpu(cls.engine)
        for name in _OF_THE_ALLOCATOR:
            if "expandable_segments:true" in os.environ.get(name, "").lower():
                raise ValueError(
                    f"rollout.vllm.transfer: found ipc with expandable_segments in {name}, accepted: without "
                    "(such memory is shared with a server where the system lets it read this process alone)"
                )

    def environment(self) -> dict[str, str]:
        # A handle travels as pickled arguments of torch's, which vLLM unpacks with this alone.
        return {"VLLM_ALLOW_INSECURE_SERIALIZATION": "1"}

    @contextmanager
    def _session(self, servers: Sequence[VllmServer], end: float) -> Iterator[None]:
        for server in servers:
            if (workers := server.world_size(end)) != 1:
                raise ValueError(
                    f"rollout.vllm.transfer: found ipc with {workers} workers of {server.url}, accepted: one "
                    "worker a server, on the GPU of rank 0; else nccl or files"
                )
            server.join({"packed": True}, end)
        try:
            yield
        finally:
            collect()

    def _give(self, servers: Sequence[VllmServer], piece: Piece, end: float) -> None:
        packed = piece.packed()
        for server in servers:
            # Each for itself: torch counts one reader an export.
            server.take({**piece.described(), "tensor_sizes": piece.sizes, **_handle(packed)}, end)


def _handle(packed: Tensor) -> dict[str, Any]:
    exported = export(packed)
    return {"ipc_handles_pickled": base64.b64encode(pickle.dumps(exported)).decode()}


def export(packed: Tensor) -> dict[str, tuple[Any, ...]]:
    """By the GPU's UUID: what ``torch.multiprocessing`` opens the tensor with in another process."""
    torch.cuda.current_stream(packed.device).synchronize()  # the bytes are there
    _, arguments = reduce_tensor(packed)  # type: ignore[no-untyped-call]
    return {str(torch.cuda.get_device_properties(packed.device).uuid): arguments}


def collect() -> None:
    """Free what no other process reads any more."""
    torch.cuda.ipc_collect()  # type: ignore[no-untyped-call]
