"""Conversations written as one text, as HH-RLHF has them: turns of ``Human:`` and ``Assistant:``."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from gapo_mega.types import Message

HUMAN = "\n\nHuman:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(cell: Any) -> bool:
    """Whether a cell is a transcript of HH-RLHF: it begins with a turn of ``Human:``."""
    return isinstance(cell, str) and cell.startswith(HUMAN)


def parse_transcript(cell: Any) -> tuple[Message, ...] | None:
    """The turns of ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``, white space around each removed.

    ``None`` for a cell that is no transcript.
    """
    if not is_transcript(cell):
        return None
    _, *parts = _TURN.split(cell)
    speakers, contents = parts[::2], parts[1::2]
    return tuple({"role": _ROLES[s], "content": c.strip()} for s, c in zip(speakers, contents, strict=True))


def in_turn(messages: Sequence[Message]) -> bool:
    """Whether user and assistant alternate, the user first."""
    return all(m["role"] == ("user", "assistant")[i % 2] for i, m in enumerate(messages))
