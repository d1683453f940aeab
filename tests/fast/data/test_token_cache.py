"""Tokenised prompts from files: the same as without, on every rank, and damage only costs time."""

from __future__ import annotations

import json
import logging
import os
import time
from pathlib import Path
from typing import Any

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from gapo_mega.config import DataConfig
from gapo_mega.data import prompt_encoding, token_cache
from gapo_mega.data.prompts import load_prompts
from gapo_mega.data.token_cache import TokenCache, cache_directory
from gapo_mega.types import Prompt
from tests.helpers.held_runs import Threads, on_ranks

ROWS = 46  # of pieces of 10
TEMPLATE = (
    "{% for m in messages %}{% if m.content == 'bad' %}{{ raise_exception('no') }}{% endif %}"
    "<{{ m.role }}> {{ m.content }} {% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)


def tokenizer(template: str = TEMPLATE) -> PreTrainedTokenizerFast:
    words = ["[UNK]", "<end>", "<system>", "<user>", "<assistant>", "be", *(f"w{i}" for i in range(60))]
    inner = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", eos_token="<end>")
    fast.chat_template = template
    return fast


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (token_cache, prompt_encoding):
        monkeypatch.setattr(module, "PIECE", 10)


def rows() -> list[dict[str, Any]]:
    """Texts, conversations, rows that are left out, and characters of every kind."""
    found: list[dict[str, Any]] = [{"prompt": f"w{i} w{i % 7}", "tag": i} for i in range(ROWS)]
    found[3] = {"prompt": " ", "tag": None}
    found[12] = {"prompt": "w1 " * 30, "tag": 12}
    found[17] = {"prompt": "w1\u2028\x85 \U0001f600 w2", "tag": "x"}
    turns = [("user", "w1"), ("assistant", "w2"), ("user", "w3"), ("assistant", "w4")]
    found[25] = {"prompt": [{"role": role, "content": text} for role, text in turns], "tag": [1, {"a": 2}]}
    found[31] = {"prompt": [{"role": "system", "content": "be"}, {"role": "user", "content": "w9"}]}
    return found


def source(directory: Path, found: list[dict[str, Any]] | None = None) -> str:
    path = directory / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in (rows() if found is None else found)))
    return str(path)


def load(
    directory: Path, cache: TokenCache | None, template: str = TEMPLATE, **changes: Any
) -> tuple[list[Prompt], list[Prompt]]:
    settings: dict[str, Any] = {"source": str(directory / "rows.jsonl"), "max_prompt_tokens": 20}
    data = DataConfig.model_validate(settings | {"heldout_prompts": 4, "system_prompt": "be"} | changes)
    return load_prompts(data, tokenizer(template), 1, {"tag": "objectives.0.column"}, cache)


def files(directory: Path) -> list[Path]:
    return sorted((directory / "prompts").iterdir())


def test_prompts_and_counts_are_those_without_a_cache(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, "gapo_mega")
    source(tmp_path)
    said = []
    for cache in (None, TokenCache(tmp_path), TokenCache(tmp_path)):
        caplog.clear()
        found = load(tmp_path, cache)
        said.append((found, caplog.messages))
    assert said[0] == said[1] == said[2]
    assert "left out 1 longer than 20 tokens and 1 empty" in caplog.text and "1 prompts end in" in caplog.text
    assert len(files(tmp_path)) == 5
    with_columns = {prompt.index: prompt.columns["tag"] for prompt in found[0]}
    assert all(tag == i or i in (17, 25, 31) for i, tag in with_columns.items())


def test_what_is_there_is_not_tokenised_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source(tmp_path)
    first = load(tmp_path, TokenCache(tmp_path))
    times = [path.stat().st_mtime_ns for path in files(tmp_path)]
    monkeypatch.setattr(prompt_encoding.ChatTemplate, "render", lambda *_, **__: pytest.fail("rendered"))
    assert load(tmp_path, TokenCache(tmp_path)) == first
    assert [path.stat().st_mtime_ns for path in files(tmp_path)] == times


@pytest.mark.parametrize(
    ("changes", "new"),
    [
        ({"system_prompt": "w5"}, 5),
        ({"max_prompt_tokens": 19}, 5),
        ({"template": TEMPLATE.replace("<assistant>", "w3")}, 5),
        ({"heldout_prompts": 2, "shuffle": False}, 0),
    ],
)
def test_other_settings_are_other_files(tmp_path: Path, changes: dict[str, Any], new: int) -> None:
    source(tmp_path)
    load(tmp_path, TokenCache(tmp_path))
    assert load(tmp_path, TokenCache(tmp_path), **changes) == load(tmp_path, None, **changes)
    assert len(files(tmp_path)) == 5 + new


def test_one_letter_makes_one_piece_again(tmp_path: Path) -> None:
    source(tmp_path)
    load(tmp_path, TokenCache(tmp_path))
    found = rows()
    found[15]["prompt"] = "w16 w2"
    source(tmp_path, found)
    assert load(tmp_path, TokenCache(tmp_path)) == load(tmp_path, None)
    assert len(files(tmp_path)) == 6


def zeros(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2 : len(content) // 2 + 40] = bytes(40)
    path.write_bytes(content)


@pytest.mark.parametrize("damage", ["zeros", "cut", "empty", "text", "another", "directory"])
def test_a_damaged_file_is_made_again_with_one_line(
    tmp_path: Path, damage: str, caplog: pytest.LogCaptureFixture
) -> None:
    source(tmp_path)
    expected = load(tmp_path, TokenCache(tmp_path))
    first, second, *_ = files(tmp_path)
    if damage == "zeros":
        zeros(first)
    elif damage == "cut":
        os.truncate(first, first.stat().st_size // 2)
    elif damage == "another":  # a sound file under another's name
        first.write_bytes(second.read_bytes())
    elif damage == "directory":
        first.unlink()
        first.mkdir()
    else:
        first.write_text("" if damage == "empty" else "x" * 300)
    assert load(tmp_path, TokenCache(tmp_path)) == expected
    said = [line for line in caplog.messages if str(first) in line or "not kept" in line]
    assert len(said) == 1 and "\n" not in said[0]
    if damage != "directory":
        caplog.clear()
        assert load(tmp_path, TokenCache(tmp_path)) == expected and "is damaged" not in caplog.text


def test_without_a_place_to_write_it_only_takes_its_time(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    source(tmp_path)
    (tmp_path / "prompts").write_text("a file")
    assert load(tmp_path, TokenCache(tmp_path)) == load(tmp_path, None)
    assert caplog.text.count("tokenised prompts are not kept in") == 1


def test_ranks_share_the_work_and_all_have_all(tmp_path: Path) -> None:
    source(tmp_path)
    expected = load(tmp_path, None)

    def work(everyone: Threads, rank: int) -> object:
        return load(tmp_path, TokenCache(tmp_path, rank, 3, everyone.gather))

    assert on_ranks(3, work) == [expected] * 3
    assert len(files(tmp_path)) == 5
    assert load(tmp_path, TokenCache(tmp_path)) == expected  # in another number of ranks, too


def test_ranks_with_caches_of_their_own_come_to_the_same(tmp_path: Path) -> None:
    source(tmp_path)

    def work(everyone: Threads, rank: int) -> object:
        return load(tmp_path, TokenCache(tmp_path / str(rank), rank, 2, everyone.gather))

    assert on_ranks(2, work) == [load(tmp_path, None)] * 2


@pytest.mark.parametrize("bad", [(2,), (35,), (35, 14), (44, 2)])
def test_the_first_row_that_is_refused_is_named_on_every_rank(tmp_path: Path, bad: tuple[int, ...]) -> None:
    found = rows()
    for place in bad:
        found[place]["prompt"] = "bad"
    source(tmp_path, found)

    def work(everyone: Threads, rank: int) -> object:
        return load(tmp_path, TokenCache(tmp_path, rank, 3, everyone.gather))

    with pytest.raises(ValueError) as caught:
        load(tmp_path, None)
    assert f"row {min(bad) + 1}: " in str(caught.value)
    assert on_ranks(3, work) == [str(caught.value)] * 3


def test_ranks_that_read_other_numbers_of_rows(tmp_path: Path) -> None:
    """A disk of each node's own, say. One of the tables is too small to be shared."""
    for rank, count in enumerate((46, 10)):
        (tmp_path / str(rank)).mkdir()
        source(tmp_path / str(rank), rows()[:count])

    def work(everyone: Threads, rank: int) -> object:
        return load(tmp_path / str(rank), TokenCache(tmp_path, rank, 2, everyone.gather))

    line = (
        "data.source: ranks read different numbers of rows (46, 10); accepted: files that are the same on all"
    )
    assert on_ranks(2, work) == [f"{line} nodes"] * 2


def test_what_a_killed_process_left_goes_after_a_day(tmp_path: Path) -> None:
    source(tmp_path)
    (tmp_path / "prompts").mkdir()
    old, new, mine = (tmp_path / "prompts" / name for name in (".a.b.npz", ".c.d.npz", "notes.txt"))
    for path in (old, new, mine):
        path.write_text("x")
        os.utime(path, (time.time() - 100_000,) * 2)
    os.utime(new)
    load(tmp_path, TokenCache(tmp_path))
    assert not old.exists() and new.exists() and mine.exists()


def test_what_another_process_finishes_meanwhile_is_not_in_the_way(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Between listing the unfinished files and looking at one it is gone: a link to nothing stands for it."""
    source(tmp_path)
    (tmp_path / "prompts").mkdir()
    finished = tmp_path / "prompts" / ".a.b.npz"
    finished.symlink_to(tmp_path / "nowhere")
    assert load(tmp_path, TokenCache(tmp_path)) == load(tmp_path, None)
    finished.unlink()
    assert len(files(tmp_path)) == 5 and "not kept" not in caplog.text


def test_small_tables_are_not_worth_a_file(tmp_path: Path) -> None:
    source(tmp_path, rows()[:10])
    load(tmp_path, TokenCache(tmp_path))
    assert not (tmp_path / "prompts").exists()


def test_where_caches_are(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("GAPO_MEGA_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_directory() == tmp_path / ".cache" / "gapo-mega"
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "x"))
    assert cache_directory() == tmp_path / "x" / "gapo-mega"
    monkeypatch.setenv("GAPO_MEGA_CACHE", "~/mine")
    assert cache_directory() == tmp_path / "mine"
