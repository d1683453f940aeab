"""Preference pairs, read in the formats of the common data sets."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from gapo_mega.config.supervised import PreferenceData
from gapo_mega.data import transcripts
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
Lengths = tuple[int, int]  # of the chosen and of the rejected response, in tokens
PKU_RESPONSES = ("response_0", "response_1")
PKU_JUDGEMENTS = {"helpful": "better_response_id", "harmless": "safer_response_id"}


@dataclass(frozen=True)
class Pair:
    """Two responses to one prompt, of which ``chosen`` is preferred.

    ``prompt`` ends with a message of the user, maybe after earlier turns and a message of the system.
    """

    prompt: tuple[Message, ...]
    chosen: str
    rejected: str

    def answered(self, response: str) -> list[Message]:
        """The conversation with ``response`` as the assistant's last message."""
        return [*self.prompt, {"role": "assistant", "content": response}]


def load_pairs(data: PreferenceData, seed: int) -> tuple[list[Pair], list[Pair]]:
    """Training and held-out pairs, in the order of their sources; no prompt is on both sides.

    Rows are left out, and counted by reason in the log, if they are malformed (a cell of the wrong type, a
    judgement that is not a response's number), if a message is empty, if both responses are identical, if the
    two conversations have different prompts, and if their turns are out of order.

    Raises ``ValueError`` for a missing file, split or column, rows in none of the formats, and when nothing
    is left.
    """

    def read(source_key: str, source: str, split_key: str, split: str) -> list[Pair]:
        table = read_rows(source_key, source, split_key, split)
        parse = _parser(data, table, source)
        return usable(table, parse, "pairs", f"{source_key} {source!r} ({split_key} {split!r})")

    return hold_out(data, seed, read, lambda pair: pair.prompt, "pairs")


def _parser(data: PreferenceData, table: Dataset, source: str) -> Callable[[Row], Pair]:
    """Check the columns of ``table``; return the function from a row to a pair."""
    kind = _detected(data, table, source) if data.format == "auto" else data.format
    if kind == "pku":
        return _pku_parser(data, table, source)
    check_column("data.chosen_column", data.chosen_column, table, source)
    check_column("data.rejected_column", data.rejected_column, table, source)
    if kind == "hh":
        return lambda row: _hh_pair(row[data.chosen_column], row[data.rejected_column])
    if isinstance(_first(table, data.chosen_column), str):
        check_column("data.prompt_column", data.prompt_column, table, source)
    return lambda row: _columns_pair(
        row.get(data.prompt_column), row[data.chosen_column], row[data.rejected_column]
    )


def _detected(data: PreferenceData, table: Dataset, source: str) -> str:
    if {*PKU_RESPONSES} <= {*table.column_names}:
        found = "pku"
    elif not {data.chosen_column, data.rejected_column} <= {*table.column_names}:
        raise ValueError(
            f"data.format: found auto for {source!r} with the columns "
            f"{', '.join(sorted(table.column_names))}, accepted: columns {data.chosen_column} and "
            f"{data.rejected_column} (data.chosen_column, data.rejected_column), or {PKU_RESPONSES[0]} and "
            f"{PKU_RESPONSES[1]}"
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


def _first(table: Dataset, column: str) -> Any:
    return next((cell for cell in table[column] if cell is not None), None)


def _pku_parser(data: PreferenceData, table: Dataset, source: str) -> Callable[[Row], Pair]:
    if data.objective is None:
        raise ValueError(
            f"data.objective: found nothing, accepted for {source!r}, whose format is pku: helpful, harmless"
        )
    judgement = PKU_JUDGEMENTS[data.objective]
    missing = {"prompt", *PKU_RESPONSES, judgement} - {*table.column_names}
    if missing:
        raise ValueError(
            f"data.format: found pku for {source!r}, which has no column {', '.join(sorted(missing))}; "
            f"accepted with data.objective {data.objective}: rows with prompt, {', '.join(PKU_RESPONSES)} "
            f"and {judgement}"
        )

    def parse(row: Row) -> Pair:
        if row[judgement] not in (0, 1):
            raise Unusable("malformed")
        better = int(row[judgement])
        return _pair(messages_of(row["prompt"]), row[PKU_RESPONSES[better]], row[PKU_RESPONSES[1 - better]])

    return parse


def _hh_pair(chosen: Any, rejected: Any) -> Pair:
    return _pair_of_conversations(parse_transcript(chosen), parse_transcript(rejected))


def _columns_pair(prompt: Any, chosen: Any, rejected: Any) -> Pair:
    if isinstance(chosen, str) or isinstance(rejected, str):
        return _pair(messages_of(prompt), chosen, rejected)
    both = messages_of(chosen), messages_of(rejected)
    if all(len(messages) == 1 for messages in both) and prompt is not None:
        both = (messages_of(prompt) + both[0], messages_of(prompt) + both[1])
    return _pair_of_conversations(*both)


def _pair_of_conversations(chosen: Messages, rejected: Messages) -> Pair:
    if chosen[-1]["role"] != "assistant" or rejected[-1]["role"] != "assistant":
        raise Unusable("turns out of order")
    if chosen[:-1] != rejected[:-1]:
        raise Unusable("with different prompts")
    return _pair(chosen[:-1], chosen[-1]["content"], rejected[-1]["content"])


def _pair(prompt: Messages, chosen: Any, rejected: Any) -> Pair:
    if not isinstance(chosen, str) or not isinstance(rejected, str):
        raise Unusable("malformed")
    check_turns(prompt, last="user")
    if not chosen.strip() or not rejected.strip():
        raise Unusable("empty")
    if chosen.strip() == rejected.strip():
        raise Unusable("identical")
    return Pair(prompt, chosen, rejected)
