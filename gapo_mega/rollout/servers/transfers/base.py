"""What all ways of sending weights have in common: the order of an update, and the stream's end."""

from __future__ import annotations

import json
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor
from urllib3.util import parse_url

from gapo_mega.config import Config, VllmConfig
from gapo_mega.models.huggingface.safetensors_stream import num_bytes
from gapo_mega.rollout.servers.client import VllmServer

_HERE = ("127.0.0.1", "localhost", "[::1]")


@dataclass(frozen=True)
class Piece:
    """Consecutive tensors of a stream, by Hugging Face names."""

    tensors: dict[str, Tensor]

    @classmethod
    def of(cls, tensors: dict[str, Tensor]) -> Piece:
        """Wide elements first: so each begins at a multiple of its size, without which torch reads none."""
        return cls(dict(sorted(tensors.items(), key=lambda item: -item[1].element_size())))

    @property
    def sizes(self) -> list[int]:
        """Bytes of each tensor."""
        return [num_bytes(tensor) for tensor in self.tensors.values()]

    def described(self) -> dict[str, Any]:
        """As vLLM wants it said: ``names``, ``dtype_names`` and ``shapes``."""
        return {
            "names": list(self.tensors),
            "dtype_names": [str(tensor.dtype).split(".")[-1] for tensor in self.tensors.values()],
            "shapes": [list(tensor.shape) for tensor in self.tensors.values()],
        }

    def packed(self) -> Tensor:
        """All bytes one after another, uint8 [sum of sizes], where the tensors are: vLLM's packed form."""
        return torch.cat([bytes_of(tensor) for tensor in self.tensors.values()])


def check_gpu(engine: str) -> None:
    """Refuse a machine without CUDA devices."""
    if not torch.cuda.is_available():
        raise ValueError(
            f"rollout.vllm.transfer: found {engine} without a CUDA device on this machine, accepted: files"
        )


def is_here(url: str) -> bool:
    """Whether it says this machine."""
    return parse_url(url).host in _HERE


def bytes_of(tensor: Tensor) -> Tensor:
    """uint8 [bytes]; a view where the tensor is contiguous."""
    return tensor.detach().contiguous().view(-1).view(torch.uint8)


class Transfer(ABC):
    """Sends the weights of one policy to servers, from rank 0.

    Attributes:
        engine: vLLM's name of the receiving side (``--weight-transfer-config``).
    """

    engine: ClassVar[str]

    def __init__(self, options: VllmConfig) -> None:
        self.options = options

    @classmethod
    def check(cls, config: Config) -> None:
        """Raise ``ValueError`` for settings that it cannot work with."""
        return None

    @classmethod
    def check_here(cls) -> None:
        """Raise ``ValueError`` for what it needs and this machine has not."""
        return None

    def arguments(self) -> list[str]:
        """Of a server that receives in this way."""
        return ["--weight-transfer-config", json.dumps({"backend": self.engine})]

    def environment(self) -> dict[str, str]:
        """Variables of such a server."""
        return {}

    def send(
        self, servers: Sequence[VllmServer], tensors: Iterable[tuple[str, Tensor]], label: str, end: float
    ) -> int:
        """Have servers answer with these weights, under that label. Returns the bytes that each was sent.

        ``end``, of ``time.monotonic``: when all of it must be done, for other ranks wait meanwhile. Iterates
        ``tensors`` to the end, whatever fails: the stream is a collective of many ranks. The error
        comes afterwards: ``ServerLost``, or ``ValueError`` for what this machine or a server refuses.
        """
        pieces = in_pieces(tensors, self.options.piece_mib << 20)
        total = 0
        try:
            with self._session(servers, end):
                for server in servers:
                    server.begin(end)
                for piece in pieces:
                    self._give(servers, piece, end)
                    total += sum(piece.sizes)
                    del piece  # its memory is free before the next one is gathered
                for server in servers:
                    server.finish(label, end)
        except Exception:
            for _ in pieces:
                pass
            raise
        return total

    @abstractmethod
    def _session(self, servers: Sequence[VllmServer], end: float) -> AbstractContextManager[None]:
        """Around one update: what it needs beside the servers' API."""

    @abstractmethod
    def _give(self, servers: Sequence[VllmServer], piece: Piece, end: float) -> None:
        """Have all servers load a piece; they are done with its memory at the return."""


def in_pieces(tensors: Iterable[tuple[str, Tensor]], most: int) -> Iterator[Piece]:
    """Consecutive tensors of up to ``most`` bytes, or one tensor each."""
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if piece and size + num_bytes(tensor) > most:
            yield Piece.of(piece)
            piece, size = {}, 0
        piece[name] = tensor.detach()
        size += num_bytes(tensor)
    if piece:
        yield Piece.of(piece)
