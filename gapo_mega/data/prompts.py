"""Prompts: read from anywhere ``datasets`` reads, tokenised once.

Every rank reads all prompts itself; nothing is communicated, so everything here is a pure function of the
configuration, the tokenizer and the seed. ``data/order.py`` says which of them a rank takes at a step.
"""

from __future__ import annotations

import hashlib
import logging
import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import chain
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gapo_mega.config import DataConfig
from gapo_mega.data.chat_template import ChatTemplate
from gapo_mega.data.order import Order
from gapo_mega.data.tables import PACKAGE_PREFIX, SPLIT_COLUMN, check_column, is_conversation, read_rows
from gapo_mega.data.transcripts import in_turn, parse_transcript
from gapo_mega.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

PACKAGED_HELDOUT = "heldout"


def load_prompts(
    data: DataConfig, tokenizer: PreTrainedTokenizerBase, seed: int
) -> tuple[list[Prompt], list[Prompt]]:
    """Training prompts and at most ``data.heldout_prompts`` held-out ones, in an order fixed by ``seed``.

    Files with a ``split`` column hold several splits, and that column names each row's; files without it are
    one split. Held-out prompts come from ``data.heldout_source``; without it from the rows marked ``heldout``
    (packaged files), else they are cut from the source. A training prompt that is also held out is left
    out, and so are prompts that are empty or longer than ``data.max_prompt_tokens``; all are counted in
    the log. ``Prompt.index`` is the row's number in its split.

    Raises ``ValueError`` for a missing file, split or column, an unreachable hub, and when nothing is left.
    """
    encoder = _Encoder(data, tokenizer)
    sources = [data.source] if isinstance(data.source, str) else data.source
    packaged = [source for source in sources if source.startswith(PACKAGE_PREFIX)]

    def read(of: list[str], split_key: str, split: str) -> list[Prompt]:
        parts = [_split_prompts(data, encoder, "data.source", name, split_key, split) for name in of]
        return list(chain.from_iterable(parts))

    train = read(sources, "data.split", data.split)
    heldout: list[Prompt] = []
    cut = False
    if data.heldout_prompts and data.heldout_source is not None:
        heldout = _split_prompts(
            data,
            encoder,
            "data.heldout_source",
            data.heldout_source,
            "data.heldout_split",
            data.heldout_split,
        )
    elif data.heldout_prompts and packaged:
        heldout = read(packaged, SPLIT_COLUMN, PACKAGED_HELDOUT)
    elif data.heldout_prompts:
        cut = True
    if data.shuffle:
        random.Random(f"train-{seed}").shuffle(train)
        random.Random(f"heldout-{seed}").shuffle(heldout)
    heldout = _distinct(train if cut else heldout)[: data.heldout_prompts]
    taken = {prompt.token_ids for prompt in heldout}
    kept = [prompt for prompt in train if prompt.token_ids not in taken]
    if not kept:
        raise ValueError(
            f"data.heldout_prompts: found {data.heldout_prompts}, which leaves no training prompt of the "
            f"{len(train)} "
            f"in {data.source!r}; accepted: fewer, or a data.heldout_source"
        )
    logger.info(
        "prompts: %d for training, %d held out (%d training rows left out because they are held out)",
        len(kept),
        len(heldout),
        len(train) - len(kept),
    )
    return kept, heldout


@dataclass(frozen=True)
class PromptPosition:
    """Where a run stands in its prompts, as its checkpoint holds it. The same on every rank."""

    step: int  # the next one to take
    prompts_per_step: int
    prompts: str  # fingerprint of the prompts and of what orders them

    @classmethod
    def of(cls, prompts: Sequence[Prompt], order: Order, step: int) -> PromptPosition:
        """The position before ``step`` of ``order`` over ``prompts``."""
        digest = hashlib.sha256(f"{order.seed} {order.shuffle}".encode())
        for prompt in prompts:
            digest.update(repr(prompt.token_ids).encode())
        return cls(step, order.batch_size, digest.hexdigest()[:16])

    def check_same_prompts(self, saved: PromptPosition) -> None:
        """Raise ``ValueError`` if ``saved``, from a checkpoint, has other prompts or another step size."""
        for key, name in (("prompts_per_step", "rollout.prompts_per_step"), ("prompts", "data or seed")):
            theirs, mine = getattr(saved, key), getattr(self, key)
            if theirs != mine:
                raise ValueError(
                    f"{name}: the checkpoint was written with other prompts ({key} {theirs}, found {mine}); "
                    "accepted: the configuration of the run that is resumed, or checkpoint.resume=false"
                )


class _Encoder:
    """Turns a cell of the prompt column into a prompt."""

    def __init__(self, data: DataConfig, tokenizer: PreTrainedTokenizerBase) -> None:
        if data.chat_template and tokenizer.chat_template is None:
            raise ValueError(
                "data.chat_template: found true, but the tokenizer of model.path has no chat template; "
                "accepted: false"
            )
        if data.system_prompt is not None and not data.chat_template:
            raise ValueError(
                "data.system_prompt: found a text with data.chat_template false; accepted: null, or a chat "
                "template"
            )
        self._data = data
        self._tokenizer = tokenizer
        self._template = ChatTemplate(tokenizer)

    def __call__(self, index: int, cell: Any, where: str) -> Prompt:
        """``where`` names the row in errors."""
        if isinstance(cell, str):
            messages = self._messages_of(cell)
        elif is_conversation(cell):
            messages = [{"role": m["role"], "content": m["content"]} for m in cell]
        else:
            raise ValueError(
                f"{where}: found {repr(cell)[:60]}, accepted: a string or a list of {{role, content}} "
                "messages"
            )
        text = next((m["content"] for m in reversed(messages) if m["role"] == "user"), "")
        ids = tuple(self._token_ids(messages, cell, where)) if text.strip() else ()
        return Prompt(index, text, ids, () if messages == [_of_user(text)] else tuple(messages))

    def _messages_of(self, cell: str) -> list[Message]:
        """What comes before a transcript's last answer; any other text is one message of the user."""
        found = parse_transcript(cell) if self._data.chat_template else None
        if not found:
            return [_of_user(cell)]
        asked = found[:-1] if found[-1]["role"] == "assistant" else found
        # Nobody can answer an answer or an empty turn: the prompt becomes empty, and is left out.
        usable = in_turn(asked) and all(m["content"] for m in asked)
        return list(asked) if usable else [_of_user("")]

    def _token_ids(self, messages: list[Message], cell: Any, where: str) -> list[int]:
        if not self._data.chat_template:
            if not isinstance(cell, str):
                raise ValueError(f"{where}: found a list of messages, which needs data.chat_template true")
            ids: list[int] = self._tokenizer(cell)["input_ids"]
            return ids
        if self._data.system_prompt is not None and messages[0]["role"] != "system":
            messages = [{"role": "system", "content": self._data.system_prompt}, *messages]
        try:
            rendered = self._template.render(messages, asked=True)
        except TemplateError as error:
            raise ValueError(f"{where}: the chat template of model.path refuses it: {error}") from None
        ids = self._tokenizer(rendered, add_special_tokens=False)["input_ids"]
        return ids


def _of_user(text: str) -> Message:
    return {"role": "user", "content": text}


def _split_prompts(
    data: DataConfig, encoder: _Encoder, source_key: str, source: str, split_key: str, split: str
) -> list[Prompt]:
    """The usable prompts of one split of one source, in the source's order."""
    table = read_rows(source_key, source, split_key, split)
    column = data.prompt_column
    check_column("data.prompt_column", column, table, source)
    prompts: list[Prompt] = []
    too_long = empty = 0
    for index, cell in enumerate(table[column]):
        prompt = encoder(index, cell, f"{source_key} {source!r}, row {index}")
        if not prompt.token_ids:
            empty += 1
        elif len(prompt.token_ids) > data.max_prompt_tokens:
            too_long += 1
        else:
            prompts.append(prompt)
    left_out = f"{too_long} longer than {data.max_prompt_tokens} tokens and {empty} empty"
    logger.info("%s %s (%s): %d prompts, left out %s", source_key, source, split, len(prompts), left_out)
    if not prompts:
        raise ValueError(
            f"{source_key}: no prompt of {source!r} ({split_key} {split!r}) is left of {len(table)} rows, "
            f"{left_out}; "
            "accepted: another source or a larger data.max_prompt_tokens"
        )
    return prompts


def _distinct(prompts: Sequence[Prompt]) -> list[Prompt]:
    def first_ones() -> Iterator[Prompt]:
        seen: set[tuple[int, ...]] = set()
        for prompt in prompts:
            if prompt.token_ids not in seen:
                seen.add(prompt.token_ids)
                yield prompt

    return list(first_ones())
