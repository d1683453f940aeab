"""One rule for cells: the same content is the same conversation in every command, and nothing is dropped."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from transformers import PreTrainedTokenizerFast

from gapo_mega.config import DataConfig
from gapo_mega.config.supervised import ChatData, PreferenceData
from gapo_mega.data.chats import load_chats
from gapo_mega.data.messages import Malformed, Messages, conversation
from gapo_mega.data.pairs import load_pairs
from gapo_mega.data.prompts import load_prompts
from tests.helpers.small_tokenizers import TEMPLATE, word_tokenizer


def said(role: str, content: Any, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


ASKED = [said("user", "w1"), said("assistant", "w2"), said("user", "w3")]
ANSWERED = [*ASKED, said("assistant", "w4")]
SPOKEN = "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3\n\nAssistant:"


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    return word_tokenizer(chat_template=TEMPLATE)


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    if path.suffix == ".parquet":
        Dataset.from_list(rows).to_parquet(str(path))
    else:
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


Reader = Callable[[Path, Any], Messages]


def as_prompt(path: Path, cell: Any) -> Messages:
    data = DataConfig(source=write(path, [{"prompt": cell}]), heldout_prompts=0)
    (prompt,), _ = load_prompts(data, word_tokenizer(chat_template=TEMPLATE), 0)
    return prompt.messages or (said("user", prompt.text),)


def as_chat(path: Path, cell: Any) -> Messages:
    data = ChatData(source=write(path, [{"prompt": cell, "response": "w9"}]), heldout_fraction=0)
    (chat,), _ = load_chats(data, 0)
    assert chat.messages[-1] == said("assistant", "w9")
    return chat.messages[:-1]


def as_pair(path: Path, cell: Any) -> Messages:
    row = {"prompt": cell, "chosen": "w8", "rejected": "w9"}
    (pair,), _ = load_pairs(PreferenceData(source=write(path, [row]), heldout_fraction=0), 0)
    return pair.prompt


def as_pair_of_messages(path: Path, cell: Any) -> Messages:
    row = {"prompt": cell, "chosen": [said("assistant", "w8")], "rejected": [said("assistant", "w9")]}
    (pair,), _ = load_pairs(PreferenceData(source=write(path, [row]), heldout_fraction=0), 0)
    return pair.prompt


def as_judged(path: Path, cell: Any) -> Messages:
    row = {"prompt": cell, "response_0": "w8", "response_1": "w9", "better_response_id": 1}
    data = PreferenceData(source=write(path, [row]), heldout_fraction=0, objective="helpful")
    (pair,), _ = load_pairs(data, 0)
    return pair.prompt


READERS = [as_prompt, as_chat, as_pair, as_pair_of_messages, as_judged]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("suffix", [".jsonl", ".parquet"])
@pytest.mark.parametrize(
    ("cell", "expected"),
    [
        ("w1 w2", [said("user", "w1 w2")]),
        ("Human: w1", [said("user", "Human: w1")]),
        (ASKED, ASKED),
        (ANSWERED, ASKED),
        (SPOKEN, ASKED),
        (SPOKEN + " w4", ASKED),
        (SPOKEN.removesuffix("\n\nAssistant:"), ASKED),
        ([said("system", "w5"), *ANSWERED], [said("system", "w5"), *ASKED]),
        ([said("user", "w1", name=None, tool_calls=None)], [said("user", "w1")]),
        ([said("user", [{"type": "text", "text": "w1", "image": None}])], [said("user", "w1")]),
    ],
)
def test_a_cell_is_the_same_conversation_everywhere(
    tmp_path: Path, read: Reader, suffix: str, cell: Any, expected: list[Any]
) -> None:
    assert read(tmp_path / f"a{suffix}", cell) == tuple(expected)


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize(
    ("message", "found"),
    [
        (said("user", "w1", name="Ann"), "found the key 'name' in message 2 of 'prompt'"),
        (said("assistant", None, tool_calls=[{"id": "1"}]), "found the key 'tool_calls' in message 2 of"),
        (
            said("user", "w1", weight=0),
            "found the key 'weight' in message 2 of 'prompt', accepted: role, content",
        ),
        (
            said("user", [{"type": "image", "url": "x"}]),
            r"found content of 1 parts \(image\) in message 2 of",
        ),
        (
            said("user", [{"type": "text", "text": "a"}] * 2),
            r"found content of 2 parts \(text, text\) in message 2",
        ),
        (said("user", [{"type": "text", "text": "a", "cache": 1}]), r"found content of 1 parts \(text\)"),
        (said("user", []), r"found content of 0 parts \(\)"),
    ],
)
def test_what_would_be_lost_is_refused(tmp_path: Path, read: Reader, message: Any, found: str) -> None:
    with pytest.raises(ValueError, match=rf"^data.source '.*a.jsonl', row 1: {found}"):
        read(tmp_path / "a.jsonl", [said("user", "w0"), message])


@pytest.mark.parametrize("column", ["messages", "chosen"])
def test_what_would_be_lost_in_a_whole_conversation_is_refused(tmp_path: Path, column: str) -> None:
    row = {column: [*ASKED, said("assistant", "w4", reasoning_content="w5")], "rejected": ANSWERED}
    source = write(tmp_path / "a.jsonl", [{column: ANSWERED, "rejected": ANSWERED}, row])
    pattern = rf"row 2: found the key 'reasoning_content' in message 4 of '{column}', accepted: role, content"
    with pytest.raises(ValueError, match=pattern):
        load_chats(ChatData(source=source, heldout_fraction=0), 0)
    if column == "chosen":
        with pytest.raises(ValueError, match=pattern):
            load_pairs(PreferenceData(source=source, heldout_fraction=0), 0)


@pytest.mark.parametrize(
    "cell", [None, 3, [], ["w1"], [{"role": "user"}], [{"content": "w1"}], {"role": "user"}]
)
def test_what_is_no_conversation(cell: Any) -> None:
    with pytest.raises(Malformed, match=r"^found .*'prompt'$"):
        conversation(cell, "prompt")


def test_prompts_are_counted_by_what_keeps_them_out(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    system = said("system", "w5")
    rows = [
        ANSWERED,
        SPOKEN + " w6",
        SPOKEN,
        [system, said("user", "w7")],
        [said("user", "w1"), said("user", "w2")],
        [said("assistant", "w1"), said("user", "w2")],
        [system, system, said("user", "w2")],
        [said("user", "w1"), system],
        [system],
        [said("assistant", "w1")],
        [said("user", "w1"), said("assistant", " "), said("user", "w2")],
        [said("user", "  ")],
    ]
    source = write(tmp_path / "a.jsonl", [{"prompt": row, "messages": "not read"} for row in rows])
    data = DataConfig(source=source, heldout_prompts=0, shuffle=False, system_prompt="w8")
    with caplog.at_level(logging.INFO):
        prompts, _ = load_prompts(data, tokenizer, 0)
    assert [prompt.index for prompt in prompts] == [0, 1, 2, 3]
    assert (
        "4 prompts, left out 0 longer than 256 tokens and 2 empty, 6 with turns out of order" in caplog.text
    )
    assert "2 prompts end in an answer, which is left out" in caplog.text
    assert "1 prompts have a system message, in place of data.system_prompt" in caplog.text
    assert "columns that are not read: messages" in caplog.text
    expected = tokenizer.apply_chat_template(
        [said("system", "w8"), *ASKED], add_generation_prompt=True, return_dict=False
    )
    assert {prompt.token_ids for prompt in prompts[:3]} == {tuple(expected)}


@pytest.mark.parametrize("role", ["human", "User", "tool", "developer", ""])
def test_roles_that_templates_would_write_as_they_stand(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, role: str
) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "w1"}, {"prompt": [said(role, "w1")]}])
    with pytest.raises(
        ValueError, match=rf"row 2: found the role '{role}' in message 1 of 'prompt', accepted: sys"
    ):
        load_prompts(DataConfig(source=source, heldout_prompts=0), tokenizer, 0)


LIST_AS_TEXT = [json.dumps(ASKED), json.dumps(ANSWERED, indent=1), str(ASKED), " " + str(ANSWERED)]


@pytest.mark.parametrize("read", READERS)
@pytest.mark.parametrize("cell", LIST_AS_TEXT)
def test_a_list_that_an_export_wrote_as_text_is_refused(tmp_path: Path, read: Reader, cell: str) -> None:
    """The policy would be asked about the JSON."""
    with pytest.raises(
        ValueError, match=r"^data.source '.*a.jsonl', row 1: found a list of messages as one text"
    ):
        read(tmp_path / "a.jsonl", cell)


@pytest.mark.parametrize(
    "text",
    ['[{"a": 1}]', "[{'role'}]", "[{'x': ", '[{"role": "user"}] What is this?', "[1, 2]", "[{" * 50_000],
)
def test_other_texts_of_brackets_are_texts(text: str) -> None:
    assert conversation(text, "prompt") == (said("user", text),)
