"""Weights on their way to a server: files of bounded size, each gone before the next one is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

from torch import Tensor

from gapo_mega.models.huggingface.safetensors_stream import num_bytes, write_safetensors

_SHARED_MEMORY = Path("/dev/shm")


def default_folder() -> str | None:
    """Memory that processes of this machine share as files; None: only the directory of temporary files."""
    return str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None


def hand_over(
    tensors: Iterable[tuple[str, Tensor]], most: int, folder: str | None, take: Callable[[str], None]
) -> int:
    """Give ``take`` the paths of files with consecutive tensors, of up to ``most`` bytes or one tensor each.

    Iterates ``tensors`` to the end, also where ``take`` raises: the stream is a collective of many ranks. The
    error comes afterwards. Returns the bytes that were handed over.
    """
    failure: Exception | None = None
    total = 0
    with tempfile.TemporaryDirectory(prefix="gapo-mega-weights-", dir=folder) as place:
        for number, piece in enumerate(_pieces(tensors, most)):
            if failure is not None:
                continue
            path = Path(place) / f"{number}.safetensors"
            try:
                write_safetensors(path, piece, piece.items())
                take(str(path))
            except Exception as error:
                failure = error
            total += sum(map(num_bytes, piece.values()))
            path.unlink(missing_ok=True)
    if failure is not None:
        raise failure
    return total


def _pieces(tensors: Iterable[tuple[str, Tensor]], most: int) -> Iterator[dict[str, Tensor]]:
    piece: dict[str, Tensor] = {}
    size = 0
    for name, tensor in tensors:
        if piece and size + num_bytes(tensor) > most:
            yield piece
            piece, size = {}, 0
        piece[name] = tensor.detach().cpu()
        size += num_bytes(tensor)
    if piece:
        yield piece
