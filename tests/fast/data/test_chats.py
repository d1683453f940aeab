"""Conversations for fine-tuning: every format, what is left out, and held-out prompts."""

from __future__ import annotations

import gzip
import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config.supervised import ChatData
from gapo_mega.data.chats import Chat, load_chats

TALK = [
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "And?"},
    {"role": "assistant", "content": "So."},
]
SPOKEN = "\n\nHuman: Hi\n\nAssistant: Hello.\n\nHuman: And?\n\nAssistant: So."


def write(path: Path, rows: Sequence[dict[str, Any]]) -> str:
    text = "".join(json.dumps(row) + "\n" for row in rows)
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return str(path)


def data(source: str, **changes: Any) -> ChatData:
    return ChatData.model_validate({"source": source, "heldout_fraction": 0, **changes})


@pytest.mark.parametrize(
    ("row", "options"),
    [
        ({"messages": TALK, "prompt": "not read", "response": "not read"}, {}),
        ({"talk": TALK}, {"messages_column": "talk"}),
        ({"prompt": TALK[:3], "response": "So."}, {}),
        ({"ask": TALK[:3], "say": "So."}, {"prompt_column": "ask", "response_column": "say"}),
        ({"chosen": SPOKEN, "rejected": "not read"}, {}),
        ({"chosen": TALK, "rejected": TALK}, {}),
        ({"said": SPOKEN}, {"format": "hh", "transcript_column": "said"}),
    ],
)
def test_every_format(tmp_path: Path, row: dict[str, Any], options: dict[str, str]) -> None:
    train, heldout = load_chats(data(write(tmp_path / "a.jsonl.gz", [row]), **options), seed=0)
    assert train == [Chat(tuple(TALK))] and heldout == []


def test_a_text_prompt_is_one_message_of_the_user(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "response": "Hello."}])
    assert load_chats(data(source), seed=0)[0] == [Chat(tuple(TALK[:2]))]


def test_unusable_rows_are_counted_by_reason(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    system = {"role": "system", "content": "Be kind."}
    empty = {"role": "assistant", "content": " "}
    tool = {"role": "tool", "content": "3"}
    rows: list[dict[str, Any]] = [
        {"messages": [system, *TALK]},
        {"messages": TALK[:3]},
        {"messages": TALK[1:]},
        {"messages": [*TALK[:2], system, *TALK[2:]]},
        {"messages": [TALK[0], tool, TALK[1]]},
        {"messages": [TALK[0], empty]},
        {"messages": [system]},
        {"messages": []},
        {"messages": None},
        {"messages": [{"role": "user", "content": None}, TALK[1]]},
    ]
    source = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO):
        train, _ = load_chats(data(source), seed=0)
    assert train == [Chat((system, *TALK))]
    assert "1 chats of 10 rows, left out: 1 empty, 3 malformed, 5 turns out of order" in caplog.text
    with pytest.raises(ValueError, match=r"^data.source '.*' .*: found no usable chats in 2 rows "):
        load_chats(data(write(tmp_path / "b.jsonl", rows[1:3])), seed=0)


def test_wrong_columns_are_named(tmp_path: Path) -> None:
    source = write(tmp_path / "a.jsonl", [{"prompt": "Hi", "answer": "Hello."}])
    with pytest.raises(ValueError, match=r"^data.format: found auto .* answer, prompt, accepted: messages"):
        load_chats(data(source), seed=0)
    odd = data(source, messages_column="x" * 5000, prompt_column="a\x85b")
    with pytest.raises(
        ValueError, match=r"accepted: 'x{36}\.\.\. \(data\.mes.*, 'a\\x85b' and response \(data"
    ) as told:
        load_chats(odd, seed=0)
    assert len(str(told.value)) < 500
    with pytest.raises(
        ValueError, match=r"^data.response_column: found 'response', accepted .* answer, prompt"
    ):
        load_chats(data(source, format="columns"), seed=0)
    with pytest.raises(
        ValueError, match=r"^data.transcript_column: found 'chosen', accepted .* answer, prompt"
    ):
        load_chats(data(source, format="hh"), seed=0)


def test_prompts_are_held_out_whole(tmp_path: Path) -> None:
    rows = [{"prompt": f"p{i % 30}", "response": f"r{i}"} for i in range(90)]
    config = data(write(tmp_path / "a.jsonl", rows), heldout_fraction=0.2)
    train, heldout = load_chats(config, seed=0)
    sides = [{chat.messages[0]["content"] for chat in side} for side in (train, heldout)]
    assert len(sides[1]) == 6 and len(heldout) == 18 and not sides[0] & sides[1]
    assert sides[0] | sides[1] == {f"p{i}" for i in range(30)}
    assert load_chats(config, seed=0) == (train, heldout)
    assert load_chats(config, seed=1)[1] != heldout
