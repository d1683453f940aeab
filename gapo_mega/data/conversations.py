"""Conversations in rows of data: reads transcripts and cells, checks turns, holds rows out by prompt."""

from __future__ import annotations

import hashlib
import logging
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar

from gapo_mega.config.supervised import SupervisedData
from gapo_mega.data import transcripts
from gapo_mega.data.tables import is_conversation
from gapo_mega.types import Message

logger = logging.getLogger(__name__)

Messages = tuple[Message, ...]
Item = TypeVar("Item")


class Unusable(Exception):
    """A row that cannot be trained on; its text is the reason that the log counts it under."""


def parse_transcript(cell: Any) -> Messages:
    """Like ``transcripts.parse_transcript``, but raises :class:`Unusable` where the cell is none."""
    messages = transcripts.parse_transcript(cell)
    if messages is None:
        raise Unusable("malformed")
    return messages


def messages_of(cell: Any) -> Messages:
    """The messages of a cell: a list of ``{role, content}``, or a text, which is one message of the user."""
    if isinstance(cell, str):
        return ({"role": "user", "content": cell},)
    if not is_conversation(cell) or not all(isinstance(m["role"], str) for m in cell):
        raise Unusable("malformed")
    return tuple({"role": m["role"], "content": m["content"]} for m in cell)


def check_turns(messages: Messages, last: str) -> None:
    """Raise :class:`Unusable` unless user and assistant alternate, the user first, up to role ``last``.

    A message of the system may come before them; no message may be empty.
    """
    turns = messages[1:] if messages and messages[0]["role"] == "system" else messages
    if not turns or not transcripts.in_turn(turns) or turns[-1]["role"] != last:
        raise Unusable("turns out of order")
    if not all(m["content"].strip() for m in messages):
        raise Unusable("empty")


def usable(rows: Iterable[Any], parse: Callable[[Any], Item], what: str, where: str) -> list[Item]:
    """Parse every row; leave out those that ``parse`` refuses, and count them by reason in the log.

    ``what`` names the items and ``where`` the source, parameter first. Raises ``ValueError`` if none is left.
    """
    items: list[Item] = []
    reasons: Counter[str] = Counter()
    total = 0
    for row in rows:
        total += 1
        try:
            items.append(parse(row))
        except Unusable as refused:
            reasons[str(refused)] += 1
    listed = ", ".join(f"{count} {reason}" for reason, count in sorted(reasons.items())) or "none"
    logger.info("%s: %d %s of %d rows, left out: %s", where, len(items), what, total, listed)
    if not items:
        raise ValueError(
            f"{where}: found no usable {what} in {total} rows (left out: {listed}), accepted: another "
            "source, data.format or column"
        )
    return items


def hold_out(
    data: SupervisedData,
    seed: int,
    read: Callable[[str, str, str, str], list[Item]],
    prompt_of: Callable[[Item], Messages],
    what: str,
) -> tuple[list[Item], list[Item]]:
    """Training and held-out items in the order of their sources; no opening (see ``opening``) is in both.

    ``read`` is called with the name and the value of a source and of a split. Without a held-out source,
    ``data.heldout_fraction`` of the distinct openings is drawn: those with the smallest hash with ``seed``,
    so the choice does not depend on the order of the rows.
    """
    items = read("data.source", data.source, "data.split", data.split)
    openings = [opening(prompt_of(item)) for item in items]
    heldout: list[Item]
    if data.heldout_source is not None:
        heldout = read("data.heldout_source", data.heldout_source, "data.heldout_split", data.heldout_split)
        taken = {opening(prompt_of(item)) for item in heldout}
    else:
        taken = _drawn(set(openings), data.heldout_fraction, seed)
        heldout = [item for item, key in zip(items, openings, strict=True) if key in taken]
    train = [item for item, key in zip(items, openings, strict=True) if key not in taken]
    if not train:
        raise ValueError(
            f"data.heldout_{'fraction' if data.heldout_source is None else 'source'}: found "
            f"{data.heldout_source or data.heldout_fraction}, which holds out every prompt of "
            f"{data.source!r}; accepted: one that leaves prompts to train on"
        )
    also = len(items) - len(train) if data.heldout_source is not None else 0
    logger.info(
        "%s: %d for training, %d held out (%d left out because their prompts are held out)",
        what,
        len(train),
        len(heldout),
        also,
    )
    return train, heldout


def opening(messages: Messages) -> tuple[tuple[str, str], ...]:
    """What comes before the assistant's first message: conversations that share it are kept on one side.

    The whole prompt would not do, since one conversation's prompt can hold another one's response.
    """
    first = next((i for i, m in enumerate(messages) if m["role"] == "assistant"), len(messages))
    return tuple((m["role"], m["content"]) for m in messages[:first])


def _drawn(
    openings: set[tuple[tuple[str, str], ...]], fraction: float, seed: int
) -> set[tuple[tuple[str, str], ...]]:
    count = round(fraction * len(openings))
    if fraction > 0:
        count = max(count, 1)

    def rank(key: Sequence[tuple[str, str]]) -> bytes:
        return hashlib.sha256(f"heldout-{seed}-{key!r}".encode("utf-8", "surrogatepass")).digest()

    return set(sorted(openings, key=rank)[:count])
