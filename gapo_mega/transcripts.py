"""Conversations written as one text, as HH-RLHF has them: turns of ``Human:`` and ``Assistant:``."""

from __future__ import annotations

import re
from typing import Any

from gapo_mega.types import Message

HUMAN = "\n\nHuman:"
_TURN = re.compile(r"\n\n(Human|Assistant):")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def is_transcript(cell: Any) -> bool:
    """Whether a cell is a transcript of HH-RLHF: it begins with a turn of ``Human:``."""
    return isinstance(cell, str) and cell.startswith(HUMAN)


def parse_transcript(text: str) -> tuple[Message, ...] | None:
    """The turns of ``"\\n\\nHuman: ...\\n\\nAssistant: ..."``, white space around each removed.

    ``None`` where something comes before the first turn, or there is none.
    """
    before, *parts = _TURN.split(text)
    if before.strip() or not parts:
        return None
    speakers, contents = parts[::2], parts[1::2]
    return tuple({"role": _ROLES[s], "content": c.strip()} for s, c in zip(speakers, contents, strict=True))
