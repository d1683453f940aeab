"""Special tokens around prompts, answers and pairs, with tokenizers that add them by themselves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from gapo_mega.config import DataConfig
from gapo_mega.data.chats import Chat
from gapo_mega.data.encoding import encode_chats, encode_pairs
from gapo_mega.data.pairs import Pair
from gapo_mega.data.prompt_encoding import opened
from gapo_mega.data.prompts import load_prompts
from tests.helpers.small_tokenizers import TEMPLATE, word_tokenizer

AROUND = ["$A", "<bos> $A", "$A <eos>", "<bos> $A <eos>", "<eos> $A <eos>", "<bos> <bos> $A <eos> <eos>"]


def tokens(tokenizer: PreTrainedTokenizerFast, path: Path, text: str, **data: Any) -> list[str]:
    path.write_text(json.dumps({"prompt": text}) + "\n")
    config = DataConfig(source=str(path), heldout_prompts=0, **data)
    (prompt,), _ = load_prompts(config, tokenizer, 0)
    return tokenizer.convert_ids_to_tokens(list(prompt.token_ids))


@pytest.mark.parametrize("around", AROUND)
def test_a_raw_prompt_begins_as_the_tokenizer_has_it_and_never_ends(tmp_path: Path, around: str) -> None:
    tokenizer = word_tokenizer(around)
    expected = f"{around.partition('$A')[0]} w1 w2 w1".split()
    assert tokens(tokenizer, tmp_path / "a.jsonl", "w1 w2 w1", chat_template=False) == expected


def test_a_beginning_that_the_text_writes_is_not_doubled(tmp_path: Path) -> None:
    tokenizer = word_tokenizer("<bos> $A <eos>")
    path = tmp_path / "a.jsonl"
    assert tokens(tokenizer, path, "<bos> w1", chat_template=False) == ["<bos>", "w1"]
    assert tokens(tokenizer, path, "<bos>", chat_template=False) == ["<bos>"]
    assert opened(tokenizer, "w1 <eos> w1") == tokenizer.convert_tokens_to_ids(["<bos>", "w1", "<eos>", "w1"])


def test_a_prompt_that_ends_where_the_answer_should_begin_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    with pytest.raises(
        ValueError, match=r"^data.source '.*', row 1: found a prompt whose last token is '<eos>'"
    ):
        tokens(word_tokenizer(), path, "w1 <eos>", chat_template=False)
    closed = word_tokenizer(chat_template="{% for m in messages %}{{ m.content }} <eos> {% endfor %}")
    with pytest.raises(ValueError, match=r"row 1: found a prompt whose last token is '<eos>'"):
        tokens(closed, path, "w1")


@pytest.mark.parametrize("around", AROUND)
def test_with_a_template_its_special_tokens_are_all(tmp_path: Path, around: str) -> None:
    tokenizer = word_tokenizer(around, TEMPLATE)
    assert tokens(tokenizer, tmp_path / "a.jsonl", "w1") == ["<bos>", "<user>", "w1", "<eos>", "<assistant>"]
    asked = ({"role": "user", "content": "w1"},)
    answered = ["<bos>", "<user>", "w1", "<eos>", "<assistant>", "w2", "<eos>"]
    ((ids_T, learned_T),) = encode_chats(
        [Chat((*asked, {"role": "assistant", "content": "w2"}))], tokenizer, None, 99
    )
    assert tokenizer.convert_ids_to_tokens(ids_T.tolist()) == answered
    assert learned_T.tolist() == [False] * 5 + [True, True]  # the answer, and its end once
    ((both,), _) = encode_pairs([Pair(asked, "w2", "w3")], tokenizer, None, 99)
    assert [tokenizer.convert_ids_to_tokens(ids.tolist()) for ids in both] == [
        answered,
        [*answered[:-2], "w3", "<eos>"],
    ]


def test_a_real_tokenizer_of_bytes(tmp_path: Path, smollm2: Path) -> None:
    from tokenizers import processors
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    bare = tokenizer("Hello there, 你好")["input_ids"]
    end = (tokenizer.eos_token, tokenizer.eos_token_id)
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single=f"$A {end[0]}", special_tokens=[end]
    )
    assert tokenizer("Hello there, 你好")["input_ids"] == [*bare, end[1]]
    assert opened(tokenizer, "Hello there, 你好") == bare
