"""Preference pairs, read in the formats of the common data sets."""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from gapo_mega.config.supervised import ObjectivePairs, PairObjective, PreferenceData
from gapo_mega.data import transcripts
from gapo_mega.data.conversations import Unusable, check_turns, hold_out, opening, prompt_of, usable
from gapo_mega.data.json_rows import Row
from gapo_mega.data.messages import Messages, check_no_list, conversation
from gapo_mega.data.tables import Source, Table, check_column, listed_names, read_rows, tell_unread
from gapo_mega.option_checks import shown_name
from gapo_mega.types import Message

logger = logging.getLogger(__name__)

Lengths = tuple[int, int]  # of the chosen and of the rejected response, in tokens
PKU_RESPONSES = ("response_0", "response_1")
PKU_JUDGEMENTS = {"helpful": "better_response_id", "harmless": "safer_response_id"}


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which ``chosen`` is preferred.

    ``prompt`` ends with a message of the user, maybe after earlier turns and a message of the system.
    ``margin``: what other objectives say for the chosen response, weighted (``data.margins``).
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str
    margin: float = 0.0

    def answered(self, response: str) -> list[Message]:
        """The conversation with ``response`` as the assistant's last message."""
        return [*self.prompt, {"role": "assistant", "content": response}]


@contextmanager
def errors_of(objective: int) -> Iterator[None]:
    """Let errors about ``data`` in the block name those of one of several objectives."""
    try:
        yield
    except ValueError as error:
        inside = str(error).startswith("data.")
        raise ValueError(f"objectives.{objective}.{error}" if inside else str(error)) from error


def load_objectives(
    objectives: Sequence[PairObjective], seed: int
) -> tuple[list[list[Pair]], list[list[Pair]]]:
    """``load_pairs`` for each; no prompt that one objective holds out is trained on in another.

    Prompts count as in ``conversations.hold_out``.
    """
    train, heldout = [], []
    for index, objective in enumerate(objectives):
        with errors_of(index):
            training, held = load_pairs(objective.data, seed)
        train.append(training)
        heldout.append(held)
    taken = {opening(pair.prompt) for held in heldout for pair in held}
    for index, objective in enumerate(objectives):
        kept = [pair for pair in train[index] if opening(pair.prompt) not in taken]
        if len(kept) < len(train[index]):
            logger.info(
                "%s: left out %d pairs whose prompts another objective holds out",
                objective.name,
                len(train[index]) - len(kept),
            )
        if not kept:
            raise ValueError(
                f"objectives.{index}.data.source: found {objective.data.source!r}, whose prompts are all "
                "held out by other objectives; accepted: data that leave prompts to train on"
            )
        train[index] = kept
    return train, heldout


def load_pairs(data: PreferenceData, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, in the order of their sources; no prompt is on both sides.

    Rows are left out, and counted by reason in the log, if they are malformed (a cell of the wrong type, a
    judgement that is not a response's number), if a message is empty, if both responses are identical, if the
    two conversations have different prompts, and if their turns are out of order.

    Raises ``ValueError`` for a missing file, split or column, rows in none of the formats, and when nothing
    is left.
    """

    def read(source: Source) -> list[Pair]:
        table = read_rows(source)
        return usable(table, pair_parser(data, table), "pairs")

    return hold_out(data, seed, read, lambda pair: pair.prompt, "pairs")


def pair_parser(data: PreferenceData, table: Table) -> Callable[[Row], Pair]:
    """Check the columns of ``table``; return the function from a row to a pair.

    It raises ``Unusable``, ``Malformed`` or ``Lossy`` for a row that is none.
    """
    margins = data.margins if isinstance(data, ObjectivePairs) else {}
    for column in margins:
        check_column(f"data.margins.{column}", column, table)
    parse = _format_parser(data, table, list(margins))
    if not margins:
        return parse
    return lambda row: replace(parse(row), margin=_margin(row, margins))


def _margin(row: Row, margins: Mapping[str, float]) -> float:
    total = 0.0
    for column, weight in margins.items():
        found = row.get(column)
        if isinstance(found, bool) or not isinstance(found, int | float) or not math.isfinite(found):
            raise Unusable("malformed")
        total += weight * found
    return total


def _format_parser(data: PreferenceData, table: Table, also: list[str]) -> Callable[[Row], Pair]:
    """``also``: columns that somebody else reads."""
    kind = _detected(data, table) if data.format == "auto" else data.format
    if kind == "pku":
        return _pku_parser(data, table, also)
    check_column("data.chosen_column", data.chosen_column, table)
    check_column("data.rejected_column", data.rejected_column, table)
    read = [data.chosen_column, data.rejected_column, *also]
    if kind == "hh":
        tell_unread(table, read)
        return lambda row: _hh_pair(data, row)
    first = _first(table, data.chosen_column)
    if _is_response(first):
        check_column("data.prompt_column", data.prompt_column, table)
    # Whole conversations have their prompt in them.
    whole = not _is_response(first) and not (isinstance(first, list) and len(first) == 1)
    tell_unread(table, read if whole else [*read, data.prompt_column])
    return lambda row: _columns_pair(data, row)


def _detected(data: PreferenceData, table: Table) -> str:
    source = table.source.name
    if {*PKU_RESPONSES} <= {*table.columns}:
        found = "pku"
    elif not {data.chosen_column, data.rejected_column} <= {*table.columns}:
        chosen, rejected = shown_name(data.chosen_column), shown_name(data.rejected_column)
        raise ValueError(
            f"data.format: found auto for {source!r} with the columns {listed_names(table.columns)}, "
            f"accepted: columns {chosen} and {rejected} (data.chosen_column, data.rejected_column), or "
            f"{PKU_RESPONSES[0]} and {PKU_RESPONSES[1]}"
        )
    else:
        found = "hh" if transcripts.is_transcript(_first(table, data.chosen_column)) else "columns"
    if found != "pku" and data.objective is not None:
        raise ValueError(
            f"data.objective: found {data.objective} with {source!r}, whose format is {found}; accepted: "
            "null (only pku rows judge several objectives)"
        )
    logger.info("data.format: %s is read as %s", source, found)
    return found


def _first(table: Table, column: str) -> Any:
    return next((row[column] for _, row in table if row.get(column) is not None), None)


def _pku_parser(data: PreferenceData, table: Table, also: list[str]) -> Callable[[Row], Pair]:
    source = table.source.name
    if data.objective is None:
        raise ValueError(
            f"data.objective: found nothing, accepted for {source!r}, whose format is pku: helpful, harmless"
        )
    judgement = PKU_JUDGEMENTS[data.objective]
    read = {"prompt", *PKU_RESPONSES, judgement}
    missing = read - {*table.columns}
    if missing:
        raise ValueError(
            f"data.format: found pku for {source!r}, which has no column {', '.join(sorted(missing))}; "
            f"accepted with data.objective {data.objective}: rows with prompt, {', '.join(PKU_RESPONSES)} "
            f"and {judgement}"
        )

    tell_unread(table, sorted(read.union(also)))

    def parse(row: Row) -> Pair:
        if row.get(judgement) not in (0, 1):
            raise Unusable("malformed")
        chosen, rejected = PKU_RESPONSES if row[judgement] == 0 else PKU_RESPONSES[::-1]
        return _pair(prompt_of(row.get("prompt"), "prompt"), row.get(chosen), row.get(rejected))

    return parse


def _hh_pair(data: PreferenceData, row: Row) -> Pair:
    if not all(transcripts.is_transcript(row.get(c)) for c in (data.chosen_column, data.rejected_column)):
        raise Unusable("malformed")
    return _pair_of_conversations(*_both(data, row))


def _both(data: PreferenceData, row: Row) -> tuple[Messages, Messages]:
    chosen, rejected = data.chosen_column, data.rejected_column
    return conversation(row.get(chosen), chosen), conversation(row.get(rejected), rejected)


def _columns_pair(data: PreferenceData, row: Row) -> Pair:
    prompt, column = row.get(data.prompt_column), data.prompt_column
    chosen, rejected = row.get(data.chosen_column), row.get(data.rejected_column)
    if _is_response(chosen) or _is_response(rejected):
        return _pair(prompt_of(prompt, column), chosen, rejected)
    both = _both(data, row)
    if all(len(messages) == 1 for messages in both) and prompt is not None:
        opening = prompt_of(prompt, column)
        both = (opening + both[0], opening + both[1])
    return _pair_of_conversations(*both)


def _is_response(cell: Any) -> bool:
    """Whether a cell is the text of an answer, and no conversation."""
    return isinstance(cell, str) and not transcripts.is_transcript(cell)


def _pair_of_conversations(chosen: Messages, rejected: Messages) -> Pair:
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("turns out of order")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("with different prompts")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _pair(prompt: Messages, chosen: Any, rejected: Any) -> Pair:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise Unusable("malformed")
    check_no_list(chosen, "the chosen response")
    check_no_list(rejected, "the rejected response")
    check_turns(prompt, last="user")
    if not chosen.strip() or not rejected.strip():
        raise Unusable("empty")
    if chosen.strip() == rejected.strip():
        raise Unusable("identical")
    return Pair(prompt, chosen, rejected)
