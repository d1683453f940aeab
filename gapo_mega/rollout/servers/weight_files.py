"""Weights on their way to a server: files of bounded size, each gone before the next one is written."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from torch import Tensor

from gapo_mega.models.huggingface.safetensors_stream import num_bytes, write_safetensors
from gapo_mega.scratch import TEMPORARY, remove_left, scratch

_SHARED_MEMORY = Path("/dev/shm")
_PREFIX = f"{TEMPORARY}weights-"


def default_folder() -> str | None:
    """Memory that processes of this machine share as files; None: only the directory of temporary files."""
    return str(_SHARED_MEMORY) if _SHARED_MEMORY.is_dir() else None


def hand_over(
    tensors: Iterable[tuple[str, Tensor]], most: int, folder: str | None, take: Callable[[str], None]
) -> int:
    """Give ``take`` the paths of files with consecutive tensors, of up to ``most`` bytes or one tensor each.

    Iterates ``tensors`` to the end, whatever fails: the stream is a collective of many ranks. The error comes
    afterwards; ``ValueError`` where nothing can be written. Returns the bytes that were handed over.
    """
    pieces = _pieces(tensors, most)
    total = 0
    try:
        with _place(folder, most) as place:
            for number, piece in enumerate(pieces):
                path = place / f"{number}.safetensors"
                with _writing(place.parent, most):
                    write_safetensors(path, piece, piece.items())
                take(str(path))
                total += sum(map(num_bytes, piece.values()))
                path.unlink()
    except Exception:
        for _ in pieces:
            pass
        raise
    return total


@contextmanager
def _place(folder: str | None, most: int) -> Iterator[Path]:
    """A new directory for the files, gone afterwards."""
    parent = Path(folder or tempfile.gettempdir())
    with ExitStack() as stack:
        with _writing(parent, most):
            remove_left(parent, _PREFIX)
            place, _ = stack.enter_context(scratch(parent, _PREFIX))
        yield place


@contextmanager
def _writing(folder: Path, most: int) -> Iterator[None]:
    """Within: what the file system says becomes a ``ValueError``."""
    try:
        yield
    except OSError as error:
        raise ValueError(
            f"rollout.vllm.weights_directory: weights cannot be written to {folder} "
            f"({error.strerror or error}), accepted: a directory with room for rollout.vllm.piece_mib, "
            f"{most >> 20} MiB, or for the largest tensor"
        ) from error


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
