"""Weights in files of bounded size, each gone before the next one is written: for servers on any device."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import ClassVar

from gapo_mega.config import Config, VllmConfig
from gapo_mega.files import local
from gapo_mega.models.huggingface.safetensors_stream import write_safetensors
from gapo_mega.rollout.servers.client import VllmServer
from gapo_mega.rollout.servers.transfers.base import Piece, Transfer, is_here
from gapo_mega.scratch import TEMPORARY, remove_left, scratch

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = f"{TEMPORARY}weights-"


def default_folder() -> str | None:
    """Memory that processes of this machine share as files; None: only the directory of temporary files."""
    return str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None


class Files(Transfer):
    """A safetensors file a piece, in shared memory or a directory that the servers share.

    vLLM has no engine for this; ``in_vllm/gapo_mega_vllm.py`` is its other side.
    """

    engine: ClassVar[str] = "gapo_files"

    def __init__(self, options: VllmConfig) -> None:
        super().__init__(options)
        given = options.weights_directory
        # Absolute, as the server finds it, which works elsewhere.
        self._parent = Path((default_folder() or tempfile.gettempdir()) if given is None else local(given))
        self._parent = self._parent.absolute()
        self._place: Path | None = None
        self._written = 0

    @classmethod
    def check(cls, config: Config) -> None:
        vllm = config.rollout.vllm
        for url in vllm.urls:
            if vllm.weights_directory is None and not is_here(url):
                raise ValueError(
                    f"rollout.vllm.weights_directory: found none with rollout.vllm.url {url}, accepted: a "
                    "directory that the server reads under the same path, or rollout.vllm.transfer nccl"
                )

    def arguments(self) -> list[str]:
        # Has vLLM's workers import the file, which makes the engine known to them.
        return [*super().arguments(), "--worker-extension-cls", "gapo_mega_vllm.Imported"]

    @contextmanager
    def _session(self, servers: Sequence[VllmServer], end: float) -> Iterator[None]:
        """With a new directory for the files, gone afterwards."""
        with ExitStack() as stack:
            with self._writing():
                remove_left(self._parent, _PREFIX)
                self._place, _ = stack.enter_context(scratch(self._parent, _PREFIX))
            yield

    def _give(self, servers: Sequence[VllmServer], piece: Piece, end: float) -> None:
        assert self._place is not None
        self._written += 1
        path = self._place / f"{self._written}.safetensors"
        tensors = {name: tensor.cpu() for name, tensor in piece.tensors.items()}
        with self._writing():
            write_safetensors(path, tensors, tensors.items())
        for server in servers:
            server.take({"path": str(path)}, end)
        path.unlink()

    @contextmanager
    def _writing(self) -> Iterator[None]:
        """Within: what the file system says becomes a ``ValueError``."""
        try:
            yield
        except OSError as error:
            raise ValueError(
                f"rollout.vllm.weights_directory: weights cannot be written to {self._parent} "
                f"({error.strerror or error}), accepted: a directory with room for rollout.vllm.piece_mib, "
                f"{self.options.piece_mib} MiB, or for the largest tensor"
            ) from error
