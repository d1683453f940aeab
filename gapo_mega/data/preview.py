"""Reads the first rows of every source: what can be found out about data without reading all of them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, TypeVar

from gapo_mega.config import DataConfig
from gapo_mega.config.supervised import (
    ChatData,
    PairsConfig,
    PreferenceData,
    RewardModelConfig,
    SftConfig,
    SupervisedConfig,
)
from gapo_mega.data.chats import chat_parser
from gapo_mega.data.conversations import counted, read_usable, sources
from gapo_mega.data.encoding import encode_answers, encode_chats, encode_pairs
from gapo_mega.data.json_rows import Row
from gapo_mega.data.pairs import errors_of, pair_parser
from gapo_mega.data.prompt_encoding import PromptEncoder
from gapo_mega.data.prompts import prompt_sources
from gapo_mega.data.tables import Source, Table, read_rows

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

ROWS = 16  # that are read of a source
_ON_THE_HUB = "it is no local file or directory and the hub was not asked"
Item = TypeVar("Item")
Tokenizer = Callable[[], "PreTrainedTokenizerBase"]


def preview_prompts(
    data: DataConfig, tokenizer: Tokenizer, columns: Mapping[str, str] | None = None
) -> list[str]:
    """Read the first rows of every source, and make prompts of them; one line about each source.

    A source that only the hub has is not read: the line says so. ``tokenizer`` is called for the others.
    Raises ``ValueError`` as reading all rows would: for a source, split, subset or column that is not there,
    a cell of another shape, and a conversation that the template refuses.
    """

    def check(table: Table) -> tuple[int, str]:
        encoder = PromptEncoder(data, tokenizer(), columns)
        return len(encoder.all_of(table)), encoder.left_out()

    training, heldout = prompt_sources(data)
    return [_checked(source, check) for source in [*training, *([heldout] if heldout else [])]]


def preview_supervised(config: SupervisedConfig, tokenizer: Tokenizer) -> list[str]:
    """As :func:`preview_prompts`, for conversations to fine-tune on, or preference pairs."""
    if isinstance(config, SftConfig):
        return _chats(config, config.data, tokenizer)
    if isinstance(config, PairsConfig):
        return [line for index in range(config.data_sets) for line in _objective(config, index, tokenizer)]
    assert isinstance(config, RewardModelConfig)
    return _pairs(config, config.data, tokenizer)


def _chats(config: SftConfig, data: ChatData, tokenizer: Tokenizer) -> list[str]:

    def check(table: Table) -> tuple[int, str]:
        chats, left_out = _parsed(table, chat_parser(data, table))
        template = config.model.chat_template
        encode_chats(chats, tokenizer(), template, sys.maxsize, assistant_only=config.assistant_only)
        return len(chats), left_out

    return [_checked(source, check) for source in sources(data) if source is not None]


def _pairs(config: RewardModelConfig, data: PreferenceData, tokenizer: Tokenizer) -> list[str]:
    def check(table: Table) -> tuple[int, str]:
        pairs, left_out = _parsed(table, pair_parser(data, table))
        encode_pairs(pairs, tokenizer(), config.model.chat_template, sys.maxsize)
        return len(pairs), left_out

    return [_checked(source, check) for source in sources(data) if source is not None]


def _objective(config: PairsConfig, index: int, tokenizer: Tokenizer) -> list[str]:
    data = config.objectives[index].data

    def check(table: Table) -> tuple[int, str]:
        pairs, left_out = _parsed(table, pair_parser(data, table))
        encode_answers(pairs, tokenizer(), config.model.chat_template, sys.maxsize)
        return len(pairs), left_out

    with errors_of(index):
        return [_checked(source, check) for source in sources(data) if source is not None]


def _parsed(table: Table, parse: Callable[[Row], Item]) -> tuple[list[Item], str]:
    items, reasons = read_usable(table, parse)
    return items, counted(reasons)


def unchecked(data: DataConfig, why: str) -> list[str]:
    """One line about each source of prompts, none of which was read."""
    training, heldout = prompt_sources(data)
    sources = [*training, *([heldout] if heldout else [])]
    return [
        f"{source}: not checked, since {_ON_THE_HUB if source.is_on_the_hub else why}" for source in sources
    ]


def _checked(source: Source, check: Callable[[Table], tuple[int, str]]) -> str:
    """``check`` gives the number of usable rows, and how many are left out by reason."""
    if source.is_on_the_hub:
        return f"{source}: not checked, since {_ON_THE_HUB}"
    table = read_rows(source, ROWS)
    usable, left_out = check(table)
    if not usable and len(table) == ROWS:  # the first rows may all be unusable, but not all rows
        table = read_rows(source)
        usable, left_out = check(table)
    if not usable:
        raise ValueError(
            f"{source}: found no usable row in {len(table)} (left out: {left_out}), accepted: another "
            "source, column or length"
        )
    return f"{source}: checked {usable} usable rows of the first {len(table)}"
