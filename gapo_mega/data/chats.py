"""Conversations for supervised fine-tuning, read in the formats of the common data sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gapo_mega.config.supervised import ChatData
from gapo_mega.data.conversations import (
    Messages,
    Unusable,
    check_turns,
    hold_out,
    messages_of,
    parse_transcript,
    usable,
)
from gapo_mega.data.tables import check_column, read_rows
from gapo_mega.types import Message

if TYPE_CHECKING:
    from datasets import Dataset

logger = logging.getLogger(__name__)

Row = Mapping[str, Any]
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

    def read(source_key: str, source: str, split_key: str, split: str) -> list[Chat]:
        table = read_rows(source_key, source, split_key, split)
        parse = _parser(data, table, source)
        return usable(
            table,
            lambda row: _chat(parse(row)),
            "chats",
            f"{source_key} {source!r} ({split_key} {split!r})",
        )

    return hold_out(data, seed, read, lambda chat: chat.messages, "chats")


def _chat(messages: Messages) -> Chat:
    check_turns(messages, last="assistant")
    return Chat(messages)


def _parser(data: ChatData, table: Dataset, source: str) -> Callable[[Row], Messages]:
    """Check the columns of ``table``; return the function from a row to messages."""
    kind = _detected(data, table, source) if data.format == "auto" else data.format
    for name in FORMATS[kind]:
        check_column(f"data.{name}", getattr(data, name), table, source)
    if kind == "messages":
        return lambda row: _listed(row[data.messages_column])
    if kind == "hh":
        return lambda row: _spoken(row[data.transcript_column])
    return lambda row: _answered(row[data.prompt_column], row[data.response_column])


def _detected(data: ChatData, table: Dataset, source: str) -> str:
    for kind, names in FORMATS.items():
        if {getattr(data, name) for name in names} <= {*table.column_names}:
            logger.info("data.format: %s is read as %s", source, kind)
            return kind
    raise ValueError(
        f"data.format: found auto for {source!r} with the columns {', '.join(sorted(table.column_names))}, "
        f"accepted: {data.messages_column} (data.messages_column), {data.prompt_column} and "
        f"{data.response_column} (data.prompt_column, data.response_column), or {data.transcript_column} "
        "(data.transcript_column)"
    )


def _listed(cell: Any) -> Messages:
    if isinstance(cell, str):
        raise Unusable("malformed")
    return messages_of(cell)


def _spoken(cell: Any) -> Messages:
    """A transcript, or the list of messages that other preference files have in its place."""
    if isinstance(cell, list):
        return messages_of(cell)
    return parse_transcript(cell)


def _answered(prompt: Any, response: Any) -> Messages:
    if not isinstance(response, str):
        raise Unusable("malformed")
    return (*messages_of(prompt), {"role": "assistant", "content": response})
