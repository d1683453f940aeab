"""Tokenised prompts by their contents: made once, by all ranks together, and read whenever they come again.

Prompts are cut into pieces of ``PIECE`` rows. A piece is known by a digest of its rows and of everything else
that its tokens follow from, so a cache never has to be told that something has changed.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import time
import uuid
import zipfile
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from tqdm import tqdm

from gapo_mega.config import DataConfig
from gapo_mega.data.json_rows import Row
from gapo_mega.files import local
from gapo_mega.types import Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PIECE = 4096  # rows; fewer of them in all are not worth a file
_FORMAT = 1
_OLD = 86_400.0  # seconds after which a file that was not finished never will be
# What the tokens of a prompt follow from, beside the tokenizer and the row.
_SETTINGS = ("prompt_column", "system_prompt", "chat_template", "max_prompt_tokens")

Numbered = tuple[int, Row]


@dataclass(frozen=True)
class Encoded:
    """Prompts of consecutive rows, whose ``index`` counts from the first of these, and what was counted."""

    prompts: Sequence[Prompt] = ()
    counts: Counter[str] = field(default_factory=Counter)

    def after(self, rows: int) -> Iterator[Prompt]:
        """The prompts, numbered after so many other rows."""
        return (replace(prompt, index=prompt.index + rows) for prompt in self.prompts)


def cache_directory() -> Path:
    """``GAPO_MEGA_CACHE``, or gapo-mega's folder where the user keeps caches."""
    own = os.environ.get("GAPO_MEGA_CACHE")
    return local(own) if own else local(os.environ.get("XDG_CACHE_HOME") or "~/.cache") / "gapo-mega"


class PromptCache:
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
        self._folder = directory / "prompts"
        self._rank, self._world, self._gather = rank, world, gather
        self._progress = progress
        self._writes = True

    def encoded(
        self,
        rows: Iterator[Numbered],
        count: int,
        encode: Callable[[Sequence[Numbered]], Encoded],
        key: Callable[[Sequence[Numbered]], str] | None,
    ) -> Iterator[Encoded]:
        """The ``count`` ``rows`` as ``encode`` makes them, piece by piece in their order. Collective.

        ``key``: the digest of a piece; None: no piece is kept or shared. Neither are those of small tables.
        Raises, on every rank, the ``ValueError`` of the first row with one.
        """
        found: list[Encoded | None] = []
        waiting: dict[int, tuple[str, Sequence[Numbered]]] = {}
        error: tuple[int, str] | None = None
        shares = key is not None and count > PIECE
        with tqdm(total=count, desc="prompts", unit="row", disable=not (self._progress and shares)) as bar:
            try:
                while piece := list(islice(rows, PIECE)):
                    number, name = len(found), key(piece) if key is not None and shares else None
                    got = None if name is None else self._read(name)
                    if got is None and (name is None or number % self._world == self._rank):
                        got = encode(piece)
                        if name is not None:
                            self._write(name, got)
                    found.append(got)
                    if got is None and name is not None:
                        waiting[number] = (name, piece)
                    bar.update(len(piece))
            except ValueError as raised:
                error = (len(found), str(raised))
        self._agree(count, error)
        for number, (known, rest) in waiting.items():  # other ranks have written them, or nobody could
            found[number] = self._read(known) or encode(rest)
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

    def _read(self, name: str) -> Encoded | None:
        path = self._folder / f"{name}.npz"
        if not path.is_file():
            return None
        try:
            with path.open("rb") as file, np.load(file, allow_pickle=False) as stored:
                about = json.loads(stored["about"].tobytes())
                ids, ends, index = (stored[part].tolist() for part in ("ids", "ends", "index"))
            if about["name"] != name:
                raise ValueError(f"holds {about['name']}")
            return Encoded(list(_prompts(about, ids, ends, index)), Counter(about["counts"]))
        except (OSError, ValueError, KeyError, TypeError, EOFError, zipfile.BadZipFile) as error:
            logger.warning("%s is damaged and is made again: %s", path, " ".join(str(error).split()))
            return None

    def _write(self, name: str, encoded: Encoded) -> None:
        if not self._writes:
            return
        about = {
            "name": name,
            "counts": encoded.counts,
            "texts": [prompt.text for prompt in encoded.prompts],
            "messages": [[dict(message) for message in prompt.messages] for prompt in encoded.prompts],
        }
        ids = [token for prompt in encoded.prompts for token in prompt.token_ids]
        partial = self._folder / f".{name}.{uuid.uuid4().hex}.npz"
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._remove_unfinished()
            np.savez(
                partial,
                about=np.frombuffer(json.dumps(about).encode(), dtype=np.uint8),
                ids=np.array(ids, dtype=np.int32),
                ends=np.cumsum([len(prompt.token_ids) for prompt in encoded.prompts], dtype=np.int64),
                index=np.array([prompt.index for prompt in encoded.prompts], dtype=np.int32),
            )
            partial.replace(self._folder / f"{name}.npz")
        except OSError as error:
            self._writes = False
            logger.warning("tokenised prompts are not kept in %s: %s", self._folder, error)
            with suppress(OSError):
                partial.unlink(missing_ok=True)

    def _remove_unfinished(self) -> None:
        for path in self._folder.glob(".*.npz"):
            if time.time() - path.stat().st_mtime > _OLD:
                path.unlink(missing_ok=True)


def digest_of(data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> str | None:
    """Of all that tokens follow from beside the rows; None for a tokenizer that is not known by contents."""
    if not tokenizer.is_fast:
        return None
    template = tokenizer.get_chat_template() if data.chat_template else ""
    about = [
        _FORMAT,
        *(version(name) for name in ("gapo-mega", "transformers", "tokenizers")),
        type(tokenizer).__name__,
        tokenizer.backend_tokenizer.to_str(),
        {key: str(value) for key, value in tokenizer.special_tokens_map.items()},
        tokenizer.eos_token_id,
        template,
        time.strftime("%Y-%m-%d") if "strftime_now" in template else "",
        {name: getattr(data, name) for name in _SETTINGS},
    ]
    return hashlib.sha256(json.dumps(about, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def digest_of_piece(settings: str, cells: Sequence[Any]) -> str:
    """The name of a piece with these ``cells``; ``settings``: what ``digest_of`` gave."""
    digest = hashlib.sha256(settings.encode())
    for cell in cells:
        digest.update(repr(cell).encode("utf-8", "surrogatepass"))
        digest.update(b"\n")
    return digest.hexdigest()[:32]


def _prompts(
    about: Mapping[str, Any], ids: Sequence[int], ends: Sequence[int], index: Sequence[int]
) -> Iterator[Prompt]:
    start = 0
    for place, text, messages, end in zip(index, about["texts"], about["messages"], ends, strict=True):
        yield Prompt(place, text, tuple(ids[start:end]), tuple(messages))
        start = end
    if start != len(ids):
        raise ValueError("lacks prompts")
