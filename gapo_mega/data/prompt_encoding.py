"""One cell of a column of prompts: the conversation that it is, and the token ids that the policy reads."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import TYPE_CHECKING, Any

import numpy as np
from jinja2 import TemplateError

from gapo_mega.config import DataConfig
from gapo_mega.data.chat_template import ChatTemplate
from gapo_mega.data.json_rows import Row
from gapo_mega.data.messages import Lossy, Malformed, asked, check_roles, conversation, of_user, turns_fault
from gapo_mega.data.tables import Source, Table, check_column, tell_unread
from gapo_mega.data.token_cache import PIECE, Arrays, Kind, TokenCache, digest_of, digest_of_piece
from gapo_mega.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOO_LONG, _EMPTY, _TURNS = "too long", "empty", "turns out of order"
_ANSWERS, _OWN_SYSTEM = "answers", "own system"
# What the tokens of a prompt follow from, beside the tokenizer and the row.
_SETTINGS = ("prompt_column", "system_prompt", "chat_template", "max_prompt_tokens")


@dataclass(frozen=True)
class Encoded:
    """Prompts of consecutive rows, whose ``index`` counts from the first of these, and what was counted."""

    prompts: Sequence[Prompt] = ()
    counts: Counter[str] = field(default_factory=Counter)

    def after(self, rows: int) -> Iterator[Prompt]:
        """The prompts, numbered after so many other rows."""
        return (replace(prompt, index=prompt.index + rows) for prompt in self.prompts)

    def packed(self) -> tuple[dict[str, Any], Arrays]:
        """As a cache keeps them."""
        about: dict[str, Any] = {
            "counts": self.counts,
            "texts": [prompt.text for prompt in self.prompts],
            "messages": [[dict(message) for message in prompt.messages] for prompt in self.prompts],
        }
        ids = [token for prompt in self.prompts for token in prompt.token_ids]
        arrays: Arrays = {
            "ids": np.array(ids, dtype=np.int32),
            "ends": np.cumsum([len(prompt.token_ids) for prompt in self.prompts], dtype=np.int64),
            "index": np.array([prompt.index for prompt in self.prompts], dtype=np.int32),
        }
        return about, arrays

    @classmethod
    def unpacked(cls, about: Mapping[str, Any], arrays: Arrays) -> Encoded:
        """Inverse of ``packed``. Raises ``ValueError`` for parts that do not fit together."""
        ids, ends, index = (arrays[part].tolist() for part in ("ids", "ends", "index"))
        prompts, start = [], 0
        for place, text, messages, end in zip(index, about["texts"], about["messages"], ends, strict=True):
            prompts.append(Prompt(place, text, tuple(ids[start:end]), tuple(messages)))
            start = end
        if start != len(ids):
            raise ValueError("lacks prompts")
        return cls(prompts, Counter(about["counts"]))


_KIND = Kind("prompts", Encoded.packed, Encoded.unpacked)


class PromptEncoder:
    """Turns rows into prompts, and counts those of the last table that cannot be used.

    Raises ``ValueError`` for settings that do not fit the tokenizer.
    """

    def __init__(
        self,
        data: DataConfig,
        tokenizer: PreTrainedTokenizerBase,
        columns: Mapping[str, str] | None = None,
        cache: TokenCache | None = None,
    ) -> None:
        """``columns``: others that prompts keep, and what errors call the setting that names each.

        ``cache``: where large tables are looked up, and shared out over ranks; None: nothing is kept.
        """
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
        self._columns = columns or {}
        self._counts: Counter[str] = Counter()  # of the last table
        self._cache = cache
        template = tokenizer.get_chat_template() if data.chat_template else None
        settings = {name: getattr(data, name) for name in _SETTINGS}
        self._digest = None if cache is None else digest_of(tokenizer, template, settings)

    def all_of(self, table: Table) -> list[Prompt]:
        """The usable prompts of ``table``, in its order; the others are counted in the log.

        ``Prompt.index`` is the row's place in the table, from 0. Collective where the cache is shared.
        Raises ``ValueError``, with the row's number, for a cell that is no prompt and for what the template
        refuses.
        """
        column = self._data.prompt_column
        check_column("data.prompt_column", column, table)
        for name, key in self._columns.items():
            check_column(key, name, table)
        tell_unread(table, [column, *self._columns])
        self._counts = Counter()
        prompts: list[Prompt] = []
        for number, encoded in enumerate(self._encoded(table)):
            self._counts += encoded.counts
            prompts += encoded.after(number * PIECE)
        if self._columns:
            prompts = self._with_columns(prompts, table)
        source = table.source
        logger.info(
            "%s %s (%s): %d prompts, left out %s",
            source.parameter,
            source.name,
            source.split,
            len(prompts),
            self.left_out(),
        )
        if self._counts[_ANSWERS]:
            logger.info("%s: %d prompts end in an answer, which is left out", source, self._counts[_ANSWERS])
        if self._counts[_OWN_SYSTEM]:
            logger.info(
                "%s: %d prompts have a system message, in place of data.system_prompt",
                source,
                self._counts[_OWN_SYSTEM],
            )
        self._tell_empty(source, prompts)
        return prompts

    def _encoded(self, table: Table) -> Iterator[Encoded]:
        """The table in pieces of ``PIECE`` rows."""
        rows = iter(table)
        digest, column = self._digest, self._data.prompt_column
        if self._cache is None:
            while piece := list(islice(rows, PIECE)):
                yield self._encode(table, piece)
            return

        def key(piece: Sequence[tuple[int, Row]]) -> str:
            assert digest is not None
            return digest_of_piece(digest, [row.get(column) for _, row in piece])

        yield from self._cache.encoded(
            _KIND,
            rows,
            len(table),
            lambda piece: self._encode(table, piece),
            None if digest is None else key,
        )

    def _with_columns(self, prompts: Sequence[Prompt], table: Table) -> list[Prompt]:
        rows = table.rows
        return [
            replace(prompt, columns={name: rows[prompt.index].get(name) for name in self._columns})
            for prompt in prompts
        ]

    def _tell_empty(self, source: Source, prompts: Sequence[Prompt]) -> None:
        for name in self._columns:
            empty = sum(prompt.columns[name] is None for prompt in prompts)
            if empty:
                logger.warning(
                    "%s: %d of %d prompts have no value in column %r", source, empty, len(prompts), name
                )

    def left_out(self) -> str:
        """How many rows of the last table are left out, by reason."""
        longest, counts = self._data.max_prompt_tokens, self._counts
        text = f"{counts[_TOO_LONG]} longer than {longest} tokens and {counts[_EMPTY]} empty"
        return f"{text}, {counts[_TURNS]} with {_TURNS}" if counts[_TURNS] else text

    def _encode(self, table: Table, rows: Sequence[tuple[int, Row]]) -> Encoded:
        """Consecutive rows. The tokenizer takes them together, which is several times as fast."""
        counts: Counter[str] = Counter()
        read: list[tuple[int, str, Sequence[Message], str | list[int]]] = []
        error: ValueError | None = None
        for index, (number, row) in enumerate(rows):
            where = table.place(number)
            try:
                found = self._prompt(row.get(self._data.prompt_column), where, counts)
            except ValueError as raised:  # what is wrong with the rows before it comes first
                error = raised
                break
            if found is not None:
                read.append((index, where, *found))
        texts = [text for _, _, _, text in read if isinstance(text, str)]
        # Special tokens are the template's business: the tokenizer adds none.
        tokens = self._tokenizer(texts, add_special_tokens=False, verbose=False)["input_ids"] if texts else []
        rendered = iter(tokens)
        prompts = []
        for index, where, messages, text in read:
            ids = next(rendered) if isinstance(text, str) else text
            prompt = self._checked(index, where, messages, ids, counts)
            if prompt is not None:
                prompts.append(prompt)
        if error is not None:
            raise error
        return Encoded(prompts, counts)

    def _checked(
        self, index: int, where: str, messages: Sequence[Message], ids: list[int], counts: Counter[str]
    ) -> Prompt | None:
        if ids and ids[-1] == self._tokenizer.eos_token_id:
            raise ValueError(
                f"{where}: found a prompt whose last token is {self._tokenizer.eos_token!r}, which ends the "
                "answer before it begins; accepted: a chat template or a text that does not write it there"
            )
        if len(ids) > self._data.max_prompt_tokens:
            counts[_TOO_LONG] += 1
            return None
        if not ids:
            return None
        text = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        return Prompt(index, text, tuple(ids), () if list(messages) == [of_user(text)] else tuple(messages))

    def _prompt(
        self, cell: Any, where: str, counts: Counter[str]
    ) -> tuple[Sequence[Message], str | list[int]] | None:
        """Messages, and their text or token ids; None for what nobody can answer."""
        try:
            return self._conversation(cell, counts) if self._data.chat_template else self._raw(cell, counts)
        except Malformed as error:
            raise ValueError(
                f"{where}: {error}, accepted: a string or a list of {{role, content}} messages"
            ) from None
        except Lossy as error:
            raise ValueError(f"{where}: {error}") from None
        except TemplateError as error:
            raise ValueError(
                f"{where}: the chat template of model.path refuses it: {' '.join(str(error).split())}"
            ) from None

    def _conversation(self, cell: Any, counts: Counter[str]) -> tuple[Sequence[Message], str] | None:
        column = self._data.prompt_column
        found = conversation(cell, column)
        check_roles(found, column)
        messages = asked(found)
        fault = turns_fault(messages, last="user")
        if fault is not None:
            counts[_EMPTY if fault == "empty" else _TURNS] += 1
            return None
        counts[_ANSWERS] += len(messages) < len(found) and bool(found[-1]["content"].strip())
        shown = list(messages)
        if self._data.system_prompt is not None:
            if messages[0]["role"] == "system":
                counts[_OWN_SYSTEM] += 1
            else:
                shown = [{"role": "system", "content": self._data.system_prompt}, *messages]
        return messages, self._template.render(shown, asked=True)

    def _raw(self, cell: Any, counts: Counter[str]) -> tuple[Sequence[Message], list[int]] | None:
        if not isinstance(cell, str):
            conversation(cell, self._data.prompt_column)
            raise Malformed("found a list of messages, which needs data.chat_template true")
        if not cell.strip():
            counts[_EMPTY] += 1
            return None
        return [of_user(cell)], opened(self._tokenizer, cell)


def opened(tokenizer: PreTrainedTokenizerBase, text: str) -> list[int]:
    """Token ids of ``text`` after the special tokens that the tokenizer puts before it, and none after it.

    Some tokenizers end every text with their end-of-sequence token; a model that reads it there has nothing
    to say. A beginning that the text itself writes is not doubled.
    """
    bare: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    full: list[int] = tokenizer(text, verbose=False)["input_ids"]
    added = len(full) - len(bare)
    # Neither holds for a tokenizer that changes the text's own tokens; the text then stands alone.
    before = next((full[:k] for k in range(added + 1) if full[k : k + len(bare)] == bare), [])
    return bare if bare[: len(before)] == before else before + bare
