"""Conversations in rows of data: what can be used, and what is held out by prompt."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from gapo_mega.config.supervised import SupervisedData
from gapo_mega.data.json_rows import Row
from gapo_mega.data.messages import Lossy, Malformed, Messages, asked, conversation, turns_fault
from gapo_mega.data.tables import Source, Table

logger = logging.getLogger(__name__)

Item = TypeVar("Item")
_SHOWN = 5  # rows that the log names of those left out for one reason


class Unusable(Exception):
    """A row that cannot be trained on; its text is the reason that the log counts it under."""


def check_turns(messages: Messages, last: str) -> None:
    """Raise :class:`Unusable` where ``turns_fault`` finds one."""
    fault = turns_fault(messages, last)
    if fault is not None:
        raise Unusable(fault)


def prompt_of(cell: Any, column: str) -> Messages:
    """The conversation in a cell of a column of prompts, without an answer that it ends in."""
    return asked(conversation(cell, column))


def usable(table: Table, parse: Callable[[Row], Item], what: str) -> list[Item]:
    """Parse every row; leave out those that ``parse`` refuses, and count them by reason in the log.

    ``what`` names the items. Raises ``ValueError`` if none is left, and for a row that would lose something.
    """
    items, reasons = read_usable(table, parse)
    listed = counted(reasons)
    where = str(table.source)
    logger.info("%s: %d %s of %d rows, left out: %s", where, len(items), what, len(table), listed)
    for reason, rows in sorted(reasons.items()):
        logger.info("%s: %s: rows %s", where, reason, ", ".join(map(str, rows[:_SHOWN])))
    if not items:
        raise ValueError(
            f"{where}: found no usable {what} in {len(table)} rows (left out: {listed}), accepted: another "
            "source, data.format or column"
        )
    return items


def counted(reasons: Mapping[str, Sequence[int]]) -> str:
    """How many rows are left out for each reason."""
    return ", ".join(f"{len(rows)} {reason}" for reason, rows in sorted(reasons.items())) or "none"


def read_usable(table: Table, parse: Callable[[Row], Item]) -> tuple[list[Item], dict[str, list[int]]]:
    """What ``parse`` makes of the rows, and the numbers of those that it refuses, by reason.

    Raises ``ValueError`` for a row that would lose something.
    """
    items: list[Item] = []
    reasons: dict[str, list[int]] = {}
    for number, row in table:
        try:
            items.append(parse(row))
        except Unusable as refused:
            reasons.setdefault(str(refused), []).append(number)
        except Malformed:
            reasons.setdefault("malformed", []).append(number)
        except Lossy as error:
            raise ValueError(f"{table.place(number)}: {error}") from None
    return items, reasons


def sources(data: SupervisedData) -> tuple[Source, Source | None]:
    """Where training rows come from, and held-out ones, if not from there too."""
    heldout = None
    if data.heldout_source is not None:
        heldout = heldout_source(data.heldout_source, data.heldout_split, data.heldout_subset)
    return training_source(data.source, data.split, data.subset), heldout


def heldout_source(name: str, split: str, subset: str | None) -> Source:
    """The source of held-out rows, with the names of its settings."""
    return Source("data.heldout_source", name, "data.heldout_split", split, "data.heldout_subset", subset)


def training_source(name: str, split: str, subset: str | None) -> Source:
    """A source of training rows, with the names of its settings."""
    return Source("data.source", name, "data.split", split, "data.subset", subset)


def hold_out(
    data: SupervisedData,
    seed: int,
    read: Callable[[Source], list[Item]],
    prompt_of: Callable[[Item], Messages],
    what: str,
) -> tuple[list[Item], list[Item]]:
    """Training and held-out items in the order of their sources; no opening (see ``opening``) is in both.

    ``read`` is called with each source. Without a held-out source,
    ``data.heldout_fraction`` of the distinct openings is drawn: those with the smallest hash with ``seed``,
    so the choice does not depend on the order of the rows.
    """
    source, from_elsewhere = sources(data)
    items = read(source)
    openings = [opening(prompt_of(item)) for item in items]
    heldout: list[Item]
    if from_elsewhere is not None:
        heldout = read(from_elsewhere)
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
