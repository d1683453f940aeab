"""Conversations in this process, against transformers."""

from __future__ import annotations

import io
import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from gapo_mega.commands.chat_terminal import over_pipe
from gapo_mega.config import Config
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.checkpoint import convert
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.runs.chat import Chat, Manner, Stopped
from gapo_mega.runs.evaluated_models import find_models
from tests.helpers.perturbed import perturbed
from tests.helpers.rewards import short, vowels
from tests.helpers.tiny import CHAT_TEMPLATE, byte_tokenizer, tiny_llama

GREEDY = Manner(SamplingParameters(8, temperature=0.0))
REFUSES_SYSTEM = "{% if messages[0].role == 'system' %}{{ raise_exception('no system role') }}{% endif %}"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("chats")
    tiny_llama(folder / "base", vocab=101)  # 128 positions
    byte_tokenizer(folder / "base", CHAT_TEMPLATE)
    perturbed(folder / "base", folder / "tuned", seed=1)
    return folder


@pytest.fixture(autouse=True)
def groups_end_with_the_test() -> Iterator[None]:
    yield
    groups.shutdown()


def silent(model: str, token: int) -> None:
    """Watches nothing."""


def by_transformers(directory: Path, messages: list[dict[str, str]], tokens: int = 8) -> str:
    """The greedy answer of ``generate`` in float32."""
    tokenizer: Any = AutoTokenizer.from_pretrained(directory)
    model: Any = AutoModelForCausalLM.from_pretrained(directory).float().eval()
    read = tokenizer.apply_chat_template(
        messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
    )
    with torch.no_grad():
        whole = model.generate(**read, max_new_tokens=tokens, do_sample=False, pad_token_id=0)
    return str(tokenizer.decode(whole[0, read["input_ids"].shape[1] :], skip_special_tokens=True))


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def test_every_model_has_its_own_side_of_the_conversation(folder: Path, tmp_path: Path) -> None:
    convert.to_checkpoint(folder / "tuned", tmp_path / "checkpoint")
    named = find_models([str(folder / "base"), f"other={tmp_path / 'checkpoint'}"])
    chat = Chat(named, replace(GREEDY, system="Be kind."))
    assert chat.models == ["base", "other"]
    said: dict[str, list[dict[str, str]]] = {"base": [], "tuned": []}
    for text in ("Hi there", "And then?", "Why?"):
        replies = chat.ask(text, silent)
        for reply, name in zip(replies, said, strict=True):
            asked = [*said[name], user(text)]
            expected = by_transformers(folder / name, [{"role": "system", "content": "Be kind."}, *asked])
            assert reply.text == expected
            said[name] = [*asked, assistant(reply.text)]
    assert said["base"] != said["tuned"]
    chat.reset()
    chat.set_system(None)
    assert [r.text for r in chat.ask("Again", silent)] == [
        by_transformers(folder / name, [user("Again")]) for name in said
    ]


def test_a_stopped_answer_stays_as_far_as_it_is(folder: Path) -> None:
    chat = Chat(find_models([str(folder / "base")]), GREEDY)
    seen: list[int] = []

    def third(model: str, token: int) -> None:
        seen.append(token)
        if len(seen) == 3:
            raise Stopped

    (reply,) = chat.ask("Hi there", third)
    assert (reply.tokens, reply.stopped, reply.finished) == (3, True, False)
    tokenizer: Any = AutoTokenizer.from_pretrained(folder / "base")
    assert reply.text == tokenizer.decode(seen) == by_transformers(folder / "base", [user("Hi there")], 3)
    (after,) = chat.ask("Go on", silent)
    history = [user("Hi there"), assistant(reply.text), user("Go on")]
    assert after.text == by_transformers(folder / "base", history)


def test_what_cannot_be_read_leaves_the_conversation_as_it_was(folder: Path) -> None:
    chat = Chat(find_models([str(folder / "base"), str(folder / "tuned")]), GREEDY)
    first = chat.ask("Hi there", silent)
    with pytest.raises(ValueError, match=r"^message: found 2\d\d tokens for base, accepted: 1 to 127"):
        chat.ask("b " * 200, silent)

    def broken(model: str, token: int) -> None:
        if model == "tuned":
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        chat.ask("Lost", broken)
    for reply, before in zip(chat.ask("Go on", silent), first, strict=True):
        history = [user("Hi there"), assistant(before.text), user("Go on")]
        assert reply.text == by_transformers(folder / before.model, history)


def test_a_long_conversation_loses_its_beginning(folder: Path) -> None:
    """Pairs of messages go, and the last one is always read with the system message."""
    chat = Chat(find_models([str(folder / "base")]), replace(GREEDY, system="S"))
    said: list[dict[str, str]] = []
    left_out = []
    for number in range(6):
        text = f"b c d e f g h i {number}"
        (reply,) = chat.ask(text, silent)
        left_out.append(reply.left_out)
        read = [{"role": "system", "content": "S"}, *said[reply.left_out :], user(text)]
        assert reply.text == by_transformers(folder / "base", read)
        said += [user(text), assistant(reply.text)]
    assert left_out[0] == 0 < left_out[-1] and all(count % 2 == 0 for count in left_out)


def configuration(folder: Path, **sections: Any) -> Config:
    return Config.model_validate(
        {
            "output_dir": str(folder / "run"),
            "model": {"path": "unused"},
            "data": {"source": "unused"},
            "objectives": [
                {"name": "short", "function": "tests.helpers.rewards:short"},
                {"name": "vowels", "function": "tests.helpers.rewards:vowels"},
            ],
            **sections,
        }
    )


def answered(chat: Chat, text: bytes, as_json: bool = False) -> tuple[list[str], str]:
    out, notes = io.StringIO(), io.StringIO()
    over_pipe(chat, io.BytesIO(text), out, notes, as_json)
    return out.getvalue().splitlines(), notes.getvalue()


def test_scores_over_a_pipe(folder: Path) -> None:
    chat = Chat(find_models([str(folder / "base")]), replace(GREEDY, config=configuration(folder)))
    lines, _ = answered(chat, b"\xef\xbb\xbfHi there\n\n/reset\nHi there\r\n/quit\nnot read", as_json=True)
    first, again = map(json.loads, lines)
    assert first == again  # the beginning of the file, and Windows' end of a line, are no text
    assert first["message"] == "Hi there" and first["model"] == "base"
    texts = ["Hi there"], [first["response"]]
    for name, function in (("short", short), ("vowels", vowels)):
        assert first["scores"][name] == pytest.approx(function(*texts)[0], rel=1e-6)  # float32
    chat.reset()
    lines, notes = answered(chat, b"Hi there\n/system X\n")
    assert lines[0] == first["response"] and lines[1].startswith("  short ")
    assert notes == "system message: X\n"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"Hi\n\xff\n", r"^line 2 of standard input: line 1: found the byte 0xff, accepted: UTF-8$"),
        (b"/go\n", r"^line 1 of standard input: found /go, accepted: /help"),
        (b"b " * 200, r"^line 1 of standard input: message: found 2\d\d tokens"),
    ],
)
def test_errors_over_a_pipe_name_the_line(folder: Path, text: bytes, message: str) -> None:
    chat = Chat(find_models([str(folder / "base")]), GREEDY)
    with pytest.raises(ValueError, match=message):
        answered(chat, text)


def test_a_template_may_refuse(folder: Path, tmp_path: Path) -> None:
    perturbed(folder / "base", tmp_path / "model", seed=2)
    byte_tokenizer(tmp_path / "model", REFUSES_SYSTEM + CHAT_TEMPLATE)
    chat = Chat(find_models([str(tmp_path / "model")]), replace(GREEDY, system="S"))
    with pytest.raises(ValueError, match=r"^message: the chat template of model refuses it: no system role$"):
        chat.ask("Hi", silent)
    chat.set_system(None)
    assert chat.ask("Hi", silent)[0].tokens


def test_a_base_model_goes_on_with_the_text(folder: Path, tmp_path: Path) -> None:
    perturbed(folder / "base", tmp_path / "model", seed=2)
    byte_tokenizer(tmp_path / "model", None)
    (tmp_path / "model" / "chat_template.jinja").unlink()
    with pytest.raises(ValueError, match=r"without a chat template, accepted: .*--raw$"):
        Chat(find_models([str(tmp_path / "model")]), GREEDY)
    chat = Chat(find_models([str(tmp_path / "model")]), replace(GREEDY, raw=True))
    tokenizer: Any = AutoTokenizer.from_pretrained(tmp_path / "model")
    model: Any = AutoModelForCausalLM.from_pretrained(tmp_path / "model").float().eval()
    for text in ("Once upon", "a time"):  # neither sees the other
        read = tokenizer(text, return_tensors="pt")
        with torch.no_grad():
            whole = model.generate(
                input_ids=read["input_ids"], max_new_tokens=8, do_sample=False, pad_token_id=0
            )
        expected = tokenizer.decode(whole[0, read["input_ids"].shape[1] :], skip_special_tokens=True)
        assert chat.ask(text, silent)[0].text == expected
    with pytest.raises(ValueError, match=r"^/system: found a text with --raw"):
        chat.set_system("S")


def test_objectives_that_read_the_data_are_refused(folder: Path) -> None:
    own = [{"name": "right", "function": "tests.helpers.rewards:short", "columns": ["answer"]}]
    config = configuration(folder, objectives=own)
    with pytest.raises(ValueError, match=r"^--scores: objective 'right': columns reads 'answer' of the data"):
        Chat(find_models([str(folder / "base")]), replace(GREEDY, config=config))
