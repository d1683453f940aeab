"""One cell of a column of prompts: the conversation that it is, and the token ids that the policy reads."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError

from gapo_mega.config import DataConfig
from gapo_mega.data.chat_template import ChatTemplate
from gapo_mega.data.messages import Lossy, Malformed, asked, check_roles, conversation, of_user, turns_fault
from gapo_mega.data.tables import Source, Table, check_column, tell_unread
from gapo_mega.types import Message, Prompt

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

logger = logging.getLogger(__name__)

_TOO_LONG, _EMPTY, _TURNS = "too long", "empty", "turns out of order"


class PromptEncoder:
    """Turns rows into prompts, and counts those of the last table that cannot be used.

    Raises ``ValueError`` for settings that do not fit the tokenizer.
    """

    def __init__(
        self, data: DataConfig, tokenizer: PreTrainedTokenizerBase, columns: Mapping[str, str] | None = None
    ) -> None:
        """``columns``: others that prompts keep, and what errors call the setting that names each."""
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
        self._reasons: Counter[str] = Counter()
        self._answers = 0
        self._own_system = 0

    def all_of(self, table: Table) -> list[Prompt]:
        """The usable prompts of ``table``, in its order; the others are counted in the log.

        ``Prompt.index`` is the row's place in the table, from 0. Raises ``ValueError``, with the row's
        number, for a cell that is no prompt and for what the template refuses.
        """
        column = self._data.prompt_column
        check_column("data.prompt_column", column, table)
        for name, key in self._columns.items():
            check_column(key, name, table)
        tell_unread(table, [column, *self._columns])
        self._reasons.clear()
        self._answers = self._own_system = 0
        prompts: list[Prompt] = []
        for index, (number, row) in enumerate(table):
            prompt = self._prompt(index, row.get(column), table.place(number))
            if prompt is not None:
                kept = {name: row.get(name) for name in self._columns}
                prompts.append(replace(prompt, columns=kept) if kept else prompt)
        source = table.source
        logger.info(
            "%s %s (%s): %d prompts, left out %s",
            source.parameter,
            source.name,
            source.split,
            len(prompts),
            self.left_out(),
        )
        if self._answers:
            logger.info("%s: %d prompts end in an answer, which is left out", source, self._answers)
        if self._own_system:
            logger.info(
                "%s: %d prompts have a system message, in place of data.system_prompt",
                source,
                self._own_system,
            )
        self._tell_empty(source, prompts)
        return prompts

    def _tell_empty(self, source: Source, prompts: Sequence[Prompt]) -> None:
        for name in self._columns:
            empty = sum(prompt.columns[name] is None for prompt in prompts)
            if empty:
                logger.warning(
                    "%s: %d of %d prompts have no value in column %r", source, empty, len(prompts), name
                )

    def left_out(self) -> str:
        """How many rows of the last table are left out, by reason."""
        longest = self._data.max_prompt_tokens
        text = f"{self._reasons[_TOO_LONG]} longer than {longest} tokens and {self._reasons[_EMPTY]} empty"
        return f"{text}, {self._reasons[_TURNS]} with {_TURNS}" if self._reasons[_TURNS] else text

    def _prompt(self, index: int, cell: Any, where: str) -> Prompt | None:
        try:
            messages, ids = self._conversation(cell) if self._data.chat_template else self._raw(cell)
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
        if ids and ids[-1] == self._tokenizer.eos_token_id:
            raise ValueError(
                f"{where}: found a prompt whose last token is {self._tokenizer.eos_token!r}, which ends the "
                "answer before it begins; accepted: a chat template or a text that does not write it there"
            )
        if ids and len(ids) > self._data.max_prompt_tokens:
            self._reasons[_TOO_LONG] += 1
            return None
        if not ids:
            return None
        text = next(m["content"] for m in reversed(messages) if m["role"] == "user")
        return Prompt(index, text, tuple(ids), () if list(messages) == [of_user(text)] else tuple(messages))

    def _conversation(self, cell: Any) -> tuple[Sequence[Message], list[int]]:
        """Messages and token ids; no ids for a conversation that nobody can answer."""
        column = self._data.prompt_column
        found = conversation(cell, column)
        check_roles(found, column)
        messages = asked(found)
        fault = turns_fault(messages, last="user")
        if fault is not None:
            self._reasons[_EMPTY if fault == "empty" else _TURNS] += 1
            return messages, []
        self._answers += len(messages) < len(found) and bool(found[-1]["content"].strip())
        shown = list(messages)
        if self._data.system_prompt is not None:
            if messages[0]["role"] == "system":
                self._own_system += 1
            else:
                shown = [{"role": "system", "content": self._data.system_prompt}, *messages]
        # Special tokens are the template's business: the tokenizer adds none.
        rendered = self._template.render(shown, asked=True)
        ids: list[int] = self._tokenizer(rendered, add_special_tokens=False, verbose=False)["input_ids"]
        return messages, ids

    def _raw(self, cell: Any) -> tuple[Sequence[Message], list[int]]:
        if not isinstance(cell, str):
            conversation(cell, self._data.prompt_column)
            raise Malformed("found a list of messages, which needs data.chat_template true")
        if not cell.strip():
            self._reasons[_EMPTY] += 1
            return [], []
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
