"""Tokenised pairs and chats from files: the same as without, on every rank, and no row is tokenised twice."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega.data import encoding, sequences, token_cache
from gapo_mega.data.chats import Chat
from gapo_mega.data.encoding import encode_answers, encode_chats, encode_pairs
from gapo_mega.data.pairs import Pair
from gapo_mega.data.token_cache import TokenCache
from tests.helpers.held_runs import Threads, on_ranks
from tests.helpers.small_tokenizers import TEMPLATE, word_tokenizer

ROWS = 46  # of pieces of 10, of which 4 at a time are given to the tokenizer
TOKENIZER = word_tokenizer(chat_template=TEMPLATE)
REFUSING = "{% for m in messages if 'w9 ' in m.content %}{{ raise_exception('no') }}{% endfor %}"
PAIRS = [
    Pair(({"role": "user", "content": f"w{i % 20} \U0001f600"},), "w1 " * (1 + i % 5), f"w2 w{i % 7}", i)
    for i in range(ROWS)
]
PAIRS[12] = replace(PAIRS[12], rejected="w1 " * 40)  # longer than is accepted
CHATS = [Chat((*pair.prompt, {"role": "assistant", "content": pair.rejected})) for pair in PAIRS]
KINDS: dict[str, tuple[Callable[..., Any], list[Any]]] = {
    "pairs": (encode_pairs, PAIRS),
    "answers": (encode_answers, PAIRS),
    "chats": (encode_chats, CHATS),
}


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_cache, sequences):
        monkeypatch.setattr(module, "PIECE", 10)
    monkeypatch.setattr(sequences, "_AT_ONCE", 4)


def encoded(
    name: str,
    cache: TokenCache | None,
    items: list[Any] | None = None,
    template: str | None = None,
    longest: int = 30,
    **options: Any,
) -> Any:
    """What the function of that kind gives, as lists."""
    encode, all_of_them = KINDS[name]
    found = encode(all_of_them if items is None else items, TOKENIZER, template, longest, cache, **options)
    return as_lists(found)


def as_lists(value: Any) -> Any:
    if isinstance(value, torch.Tensor):
        return [str(value.dtype), value.tolist()]
    return [as_lists(item) for item in value] if isinstance(value, list | tuple) else value


def files(directory: Path, name: str) -> list[Path]:
    return sorted((directory / name).iterdir())


@pytest.mark.parametrize("name", KINDS)
def test_tokens_and_counts_are_those_without_a_cache(
    name: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gapo_mega")
    said = []
    for cache in (None, TokenCache(tmp_path), TokenCache(tmp_path)):
        caplog.clear()
        said.append((encoded(name, cache), caplog.messages))
    assert said[0] == said[1] == said[2]
    assert "left out 1 longer than 30 tokens" in caplog.text
    assert len(files(tmp_path, name)) == 5


@pytest.mark.parametrize("name", KINDS)
def test_what_is_there_is_not_tokenised_again(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encoded(name, TokenCache(tmp_path))
    monkeypatch.setattr(encoding.ChatTemplate, "render", lambda *_, **__: pytest.fail("rendered"))
    assert encoded(name, TokenCache(tmp_path)) == first


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        *((name, {"longest": 29}) for name in KINDS),
        *((name, {"template": TEMPLATE.replace("<bos> ", "")}) for name in KINDS),
        ("chats", {"assistant_only": False}),
    ],
)
def test_other_settings_are_other_files(name: str, changes: dict[str, Any], tmp_path: Path) -> None:
    encoded(name, TokenCache(tmp_path))
    assert encoded(name, TokenCache(tmp_path), **changes) == encoded(name, None, **changes)
    assert len(files(tmp_path, name)) == 10


def test_one_word_makes_one_piece_again_and_a_margin_none(tmp_path: Path) -> None:
    encoded("answers", TokenCache(tmp_path))
    others = [replace(pair, margin=-1.0) for pair in PAIRS]
    assert encoded("answers", TokenCache(tmp_path), others) == encoded("answers", None, others)
    assert len(files(tmp_path, "answers")) == 5
    others[15] = replace(others[15], chosen="w3")
    assert encoded("answers", TokenCache(tmp_path), others) == encoded("answers", None, others)
    assert len(files(tmp_path, "answers")) == 6


def test_a_piece_without_a_row_that_is_short_enough(tmp_path: Path) -> None:
    items = [replace(pair, chosen="w1 " * 50) if i // 10 == 2 else pair for i, pair in enumerate(PAIRS)]
    for _ in range(2):
        for name in ("pairs", "answers"):
            assert encoded(name, TokenCache(tmp_path), items) == encoded(name, None, items)


@pytest.mark.parametrize("damage", ["cut", "another"])
def test_a_damaged_file_is_made_again_with_one_line(
    damage: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    expected = encoded("answers", TokenCache(tmp_path))
    first, second, *_ = files(tmp_path, "answers")
    if damage == "cut":
        os.truncate(first, first.stat().st_size // 2)
    else:
        first.write_bytes(second.read_bytes())
    assert encoded("answers", TokenCache(tmp_path)) == expected
    assert len([line for line in caplog.messages if str(first) in line]) == 1


@pytest.mark.parametrize("name", KINDS)
def test_ranks_share_the_work_and_all_have_all(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    expected = encoded(name, None)
    tokenised: list[int] = []
    tokenise = encoding._tokenized

    def counted(tokenizer: Any, texts: Any, offsets: bool = False) -> Any:
        tokenised.append(len(texts))
        return tokenise(tokenizer, texts, offsets)

    monkeypatch.setattr(encoding, "_tokenized", counted)

    def work(everyone: Threads, rank: int) -> object:
        return encoded(name, TokenCache(tmp_path, rank, 3, everyone.gather))

    assert on_ranks(3, work) == [expected] * 3
    assert sum(tokenised) == ROWS * (1 if name == "chats" else 2)


@pytest.mark.parametrize("name", KINDS)
def test_what_the_template_refuses_is_told_on_every_rank(name: str, tmp_path: Path) -> None:
    def work(everyone: Threads, rank: int) -> object:
        return encoded(name, TokenCache(tmp_path, rank, 3, everyone.gather), template=REFUSING)

    with pytest.raises(ValueError, match="refuses a conversation") as caught:
        encoded(name, None, template=REFUSING)
    assert on_ranks(3, work) == [str(caught.value)] * 3
