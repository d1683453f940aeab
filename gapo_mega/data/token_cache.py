"""Tokenised rows by their contents: made once, by all ranks together, and read whenever they come again.

Rows (prompts, pairs, chats) are cut into pieces of ``PIECE``. A piece is known by a digest of its rows and of
everything else that its tokens follow from, so a cache never has to be told that something has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
import zipfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

import numpy as np
from numpy.typing import NDArray
from tqdm import tqdm

from gapo_mega.files import local

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PIECE = 4096  # rows; fewer of them in all are not worth a file
_FORMAT = 1
_OLD = 86_400.0  # seconds after which a file that was not finished never will be
_ABOUT, _NAME = "about", "name"

Item = TypeVar("Item")
Piece = TypeVar("Piece")
Arrays = dict[str, NDArray[Any]]


@dataclass(frozen=True)
class Kind(Generic[Piece]):
    """How the encoded rows of one piece are kept.

    Attributes:
        name: of the rows, of their folder and of the bar.
        pack: what JSON holds of a piece, and its arrays.
        unpack: the inverse; ``ValueError``, ``KeyError`` or ``TypeError`` for what ``pack`` has not made.
    """

    name: str
    pack: Callable[[Piece], tuple[dict[str, Any], Arrays]]
    unpack: Callable[[Mapping[str, Any], Arrays], Piece]


def cache_directory() -> Path:
    """``GAPO_MEGA_CACHE``, or gapo-mega's folder where the user keeps caches."""
    own = os.environ.get("GAPO_MEGA_CACHE")
    return local(own) if own else local(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gapo-mega"


class TokenCache:
    """Encodes rows piece by piece; the ranks share what no file has."""

    def __init__(
        self,
        directory: Path,
        rank: int = 0,
        world: int = 1,
        gather: Callable[[Any], list[Any]] = lambda value: [value],
        *,
        progress: bool = False,
    ) -> None:
        """``gather``: every rank's value on every rank. ``progress``: show a bar on standard error."""
        self._directory = directory
        self._rank, self._world, self._gather = rank, world, gather
        self._progress = progress
        self._writes = True

    def encoded(
        self,
        kind: Kind[Piece],
        rows: Iterable[Item],
        count: int,
        encode: Callable[[Sequence[Item]], Piece],
        key: Callable[[Sequence[Item]], str] | None,
    ) -> Iterator[Piece]:
        """The ``count`` ``rows`` as ``encode`` makes them, piece by piece in their order. Collective.

        ``key``: the digest of a piece; None: no piece is kept or shared. Neither are those of small tables.
        Raises, on every rank, the ``ValueError`` of the first row with one.
        """
        rest = iter(rows)
        found: list[Piece | None] = []
        waiting: dict[int, tuple[str, Sequence[Item]]] = {}
        error: tuple[int, str] | None = None
        shares = key is not None and count > PIECE
        with tqdm(total=count, desc=kind.name, unit="row", disable=not (self._progress and shares)) as bar:
            try:
                while piece := list(islice(rest, PIECE)):
                    number, name = len(found), key(piece) if key is not None and shares else None
                    got = None if name is None else self._read(kind, name)
                    if got is None and (name is None or number % self._world == self._rank):
                        got = encode(piece)
                        if name is not None:
                            self._write(kind, name, got)
                    found.append(got)
                    if got is None and name is not None:
                        waiting[number] = (name, piece)
                    bar.update(len(piece))
            except ValueError as raised:
                error = (len(found), str(raised))
        self._agree(count, error)
        for number, (known, missing) in waiting.items():  # other ranks have written them, or nobody could
            got = self._read(kind, known)
            found[number] = encode(missing) if got is None else got
        yield from (each for each in found if each is not None)

    def _agree(self, count: int, error: tuple[int, str] | None) -> None:
        """Raise ``ValueError`` on all ranks for the first ``error`` of any, and for counts that differ."""
        told = self._gather([count, error])
        counts = [each[0] for each in told]
        if len(set(counts)) > 1:
            raise ValueError(
                f"data.source: ranks read different numbers of rows ({', '.join(map(str, counts))}); "
                "accepted: files that are the same on all nodes"
            )
        errors = [each[1] for each in told if each[1] is not None]
        if errors:
            raise ValueError(min(map(tuple, errors))[1])

    def _read(self, kind: Kind[Piece], name: str) -> Piece | None:
        path = self._folder(kind) / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                arrays = {part: stored[part] for part in stored.files}
            about = json.loads(arrays.pop(_ABOUT).tobytes())
            if about[_NAME] != name:
                raise ValueError(f"holds {about[_NAME]}")
            return kind.unpack(about, arrays)
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged and is made again: %s", path, " ".join(str(error).split()))
            return None

    def _write(self, kind: Kind[Piece], name: str, piece: Piece) -> None:
        if not self._writes:
            return
        about, arrays = kind.pack(piece)
        text = json.dumps({_NAME: name} | about).encode()
        stored: dict[str, Any] = {_ABOUT: np.frombuffer(text, dtype=np.uint8), **arrays}
        folder = self._folder(kind)
        partial = folder / f".{name}.{uuid.uuid4().hex}.npz"
        try:
            folder.mkdir(parents=True, exist_ok=True)
            _remove_unfinished(folder)
            np.savez(partial, **stored)
            partial.replace(folder / f"{name}.npz")
        except OSError as error:
            self._writes = False
            logger.warning("tokenised %s are not kept in %s: %s", kind.name, folder, error)
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _folder(self, kind: Kind[Any]) -> Path:
        return self._directory / kind.name


def _remove_unfinished(folder: Path) -> None:
    for path in folder.glob(".*.npz"):
        with suppress(FileNotFoundError):  # another rank, or another run, has finished or removed it since
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink()


def digest_of(
    tokenizer: PreTrainedTokenizerBase, template: str | None, settings: Mapping[str, object]
) -> str | None:
    """Of all that tokens follow from beside the rows; None for a tokenizer that is not known by contents.

    ``template``: the chat template that rows are rendered by, if one.
    """
    if not tokenizer.is_fast:
        return None
    text = template or ""
    about = [
        _FORMAT,
        *(version(name) for name in ("gapo-mega", "transformers", "tokenizers")),
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str(),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        tokenizer.eos_token_id,
        text,
        time.strftime("%Y-%m-%d") if "strftime_now" in text else "",
        dict(settings),
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_piece(settings: str, cells: Iterable[Any]) -> str:
    """The name of a piece with these ``cells``; ``settings``: what ``digest_of`` gave."""
    digest = hashlib.sha256(settings.encode())
    for cell in cells:
        digest.update(repr(cell).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:32]
