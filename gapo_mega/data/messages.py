"""Cells of data as conversations: one rule for every command and every column.

A text that begins with a turn of ``Human:`` is a transcript (HH-RLHF), any other text one message of the
user; a list holds ``{role, content}`` messages. What would be lost, as tool calls would, is refused.
"""

from __future__ import annotations

import ast
import json
import re
from collections.abc import Mapping, Sequence
from typing import Any

from gapo_mega.data.transcripts import in_turn, parse_transcript
from gapo_mega.types import Message

Messages = tuple[Message, ...]

_LIST_AS_TEXT = re.compile(r"\s*\[\s*\{\s*[\"']")
ROLES = ("system", "user", "assistant")
KEYS = ("role", "content")


class Malformed(Exception):
    """A cell that is no conversation; the text says what was found."""


class Lossy(Exception):
    """A conversation with something in it that training would leave out; the text says what, and where."""


def conversation(cell: Any, column: str) -> Messages:
    """The messages of a cell of ``column``; see above. A key whose value is null counts as absent.

    Raises :class:`Malformed` for another type, an empty list, and a message without role or content;
    :class:`Lossy` for keys other than role and content, and for content that is not a text alone.
    """
    if isinstance(cell, str):
        check_no_list(cell, column)
        return parse_transcript(cell) or (of_user(cell),)
    if not isinstance(cell, list) or not cell:
        raise Malformed(f"found {_shown(cell)} in {column!r}")
    return tuple(_message(item, f"message {n} of {column!r}") for n, item in enumerate(cell, start=1))


def of_user(text: str) -> Message:
    """A message of the user."""
    return {"role": "user", "content": text}


def asked(messages: Messages) -> Messages:
    """``messages`` without the assistant's last answer, which is to be given again."""
    return messages[:-1] if messages[-1]["role"] == "assistant" else messages


def turns_fault(messages: Sequence[Message], last: str) -> str | None:
    """Why ``messages`` cannot be trained on, in the words of the log.

    None where user and assistant alternate, the user first, up to role ``last``, maybe after one message of
    the system, and no message is empty.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or not in_turn(turns) or turns[-1]["role"] != last:
        return "turns out of order"
    return None if all(m["content"].strip() for m in messages) else "empty"


def check_no_list(text: str, column: str) -> None:
    """Raise :class:`Lossy` for a text that is a list of messages written out, as exports to CSV have them."""
    if not _LIST_AS_TEXT.match(text):
        return
    try:
        found = json.loads(text)
    except ValueError:
        try:
            found = ast.literal_eval(text.strip())  # str() of such a list
        except (ValueError, SyntaxError, MemoryError, RecursionError):
            return
    except RecursionError:
        return
    if isinstance(found, list) and all(isinstance(item, dict) and "role" in item for item in found):
        raise Lossy(f"found a list of messages as one text in {column!r}, accepted: the list itself")


def check_roles(messages: Sequence[Message], column: str) -> None:
    """Raise :class:`Lossy` for a role that is none of ``ROLES``, which most templates write as it stands."""
    for number, message in enumerate(messages, start=1):
        if message["role"] not in ROLES:
            found = f"the role {message['role']!r} in message {number} of {column!r}"
            raise Lossy(f"found {found}, accepted: {', '.join(ROLES)}")


def _message(item: Any, place: str) -> Message:
    if not isinstance(item, Mapping):
        raise Malformed(f"found {_shown(item)} as {place}")
    present = {key: value for key, value in item.items() if value is not None}
    unknown = [key for key in present if key not in KEYS]
    if unknown:
        raise Lossy(f"found the key {unknown[0]!r} in {place}, accepted: {', '.join(KEYS)}")
    role, content = present.get("role"), present.get("content")
    if isinstance(content, list):
        content = _text_of_parts(content, place)
    if not isinstance(role, str) or not isinstance(content, str):
        raise Malformed(f"found {_shown(item)} as {place}")
    return {"role": role, "content": content}


def _text_of_parts(parts: list[Any], place: str) -> str:
    """The text of content that is one ``{type: text, text}``; several would need a rule to join them."""
    only = parts[0] if len(parts) == 1 else None
    present = {k: v for k, v in only.items() if v is not None} if isinstance(only, Mapping) else {}
    if (
        present.keys() != {"type", "text"}
        or present["type"] != "text"
        or not isinstance(present["text"], str)
    ):
        kinds = [part.get("type") if isinstance(part, Mapping) else type(part).__name__ for part in parts]
        raise Lossy(
            f"found content of {len(parts)} parts ({', '.join(map(str, kinds))}) in {place}, accepted: a "
            "text, or one part {type: text, text}"
        )
    text: str = present["text"]
    return text


def _shown(value: Any) -> str:
    return repr(value)[:60]
