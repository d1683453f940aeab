"""Conversations for supervised fine-tuning, read in the formats of the common data sets."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from gapo_mega.config.supervised import ChatData
from gapo_mega.data import transcripts
from gapo_mega.data.conversations import Unusable, check_turns, hold_out, prompt_of, usable
from gapo_mega.data.json_rows import Row
from gapo_mega.data.messages import Messages, check_no_list, conversation
from gapo_mega.data.tables import Source, Table, check_column, listed_names, read_rows, tell_unread
from gapo_mega.option_checks import shown_name
from gapo_mega.types import Message

logger = logging.getLogger(__name__)

# The parameters that name the columns of each format.
FORMATS: dict[str, tuple[str, ...]] = {
    "messages": ("messages_column",),
    "columns": ("prompt_column", "response_column"),
    "hh": ("transcript_column",),
}


@dataclass(frozen=True)
class Chat:
    """A conversation that ends with a message of the assistant."""

    messages: tuple[Message, ...]


def load_chats(data: ChatData, seed: int) -> tuple[list[Chat], list[Chat]]:
    """Training and held-out conversations, in the order of their sources; no prompt is on both sides.

    Rows are left out, and counted by reason in the log, if they are malformed (a cell of the wrong type), if
    a message is empty, and if their turns are out of order; the last must be the assistant's.

    Raises ``ValueError`` for a missing file, split or column, and when nothing is left.
    """

    def read(source: Source) -> list[Chat]:
        table = read_rows(source)
        return usable(table, chat_parser(data, table), "chats")

    return hold_out(data, seed, read, lambda chat: chat.messages, "chats")


def chat_parser(data: ChatData, table: Table) -> Callable[[Row], Chat]:
    """Check the columns of ``table``; return the function from a row to a chat.

    It raises ``Unusable``, ``Malformed`` or ``Lossy`` for a row that is none.
    """
    kind = _detected(data, table) if data.format == "auto" else data.format
    names = [getattr(data, name) for name in FORMATS[kind]]
    for key, name in zip(FORMATS[kind], names, strict=True):
        check_column(f"data.{key}", name, table)
    tell_unread(table, names)

    def parse(row: Row) -> Chat:
        if kind == "columns":
            messages = _answered(prompt_of(row.get(names[0]), names[0]), row.get(names[1]))
        else:
            messages = _spoken(row.get(names[0]), names[0])
        check_turns(messages, last="assistant")
        return Chat(messages)

    return parse


def _detected(data: ChatData, table: Table) -> str:
    for kind, names in FORMATS.items():
        if {getattr(data, name) for name in names} <= {*table.columns}:
            logger.info("data.format: %s is read as %s", table.source.name, kind)
            return kind
    accepted = [
        f"{' and '.join(shown_name(getattr(data, name)) for name in names)} "
        f"({', '.join(f'data.{name}' for name in names)})"
        for names in FORMATS.values()
    ]
    raise ValueError(
        f"data.format: found auto for {table.source.name!r} with the columns {listed_names(table.columns)}, "
        f"accepted: {', '.join(accepted[:-1])}, or {accepted[-1]}"
    )


def _answered(prompt: Messages, response: Any) -> Messages:
    if not isinstance(response, str):
        raise Unusable("malformed")
    check_no_list(response, "the response")
    return (*prompt, {"role": "assistant", "content": response})


def _spoken(cell: Any, column: str) -> Messages:
    """A list of messages or a transcript: a text that is none has no answer to learn."""
    if isinstance(cell, str):
        check_no_list(cell, column)
    if isinstance(cell, str) and not transcripts.is_transcript(cell):
        raise Unusable("malformed")
    return conversation(cell, column)
