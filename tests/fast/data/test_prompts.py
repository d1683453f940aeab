"""Prompts: reading, templates, what is left out, and the position of a run in them."""

from __future__ import annotations

import gzip
import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from gapo_mega.config import DataConfig
from gapo_mega.data.order import PROMPTS, Order
from gapo_mega.data.prompts import PromptPosition, load_prompts
from gapo_mega.types import Prompt

TEMPLATE = (
    "{% for m in messages %}{% if m.role == 'user' and m.content == 'w199' %}"
    "{{ raise_exception('no w199') }}{% endif %}<{{ m.role }}> {{ m.content }} <end> {% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)
WORDS = ["[UNK]", "<bos>", "<end>", "<system>", "<user>", "<assistant>", "be", "brief"]


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {w: i for i, w in enumerate(WORDS + [f"w{i}" for i in range(200)])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="[UNK]"))
    inner.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    # As many real tokenizers do, this one adds <bos> to raw text, which a chat template must not get twice.
    inner.post_processor = processors.TemplateProcessing(single="<bos> $A", special_tokens=[("<bos>", 1)])
    fast = PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="[UNK]", bos_token="<bos>")
    fast.chat_template = TEMPLATE
    return fast


def write(path: Path, rows: list[dict[str, Any]]) -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return str(path)


def numbered(path: Path, count: int) -> str:
    return write(path, [{"prompt": f"w{i}"} for i in range(count)])


def data(source: str, **changes: Any) -> DataConfig:
    return DataConfig.model_validate({"source": source, "heldout_prompts": 0, **changes})


def ids(tokenizer: PreTrainedTokenizerFast, text: str) -> tuple[int, ...]:
    return tuple(tokenizer.convert_tokens_to_ids(text.split()))


def test_string_and_conversation_go_through_the_chat_template(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    plain = numbered(tmp_path / "a.jsonl", 1)
    (prompt,), _ = load_prompts(data(plain, system_prompt="be brief"), tokenizer, seed=0)
    assert prompt == Prompt(0, "w0", ids(tokenizer, "<system> be brief <end> <user> w0 <end> <assistant>"))
    chat = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3 w4"},
    ]
    source = write(tmp_path / "b.jsonl", [{"chat": chat}])
    (prompt,), _ = load_prompts(data(source, prompt_column="chat"), tokenizer, seed=0)
    expected = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False)
    assert prompt == Prompt(0, "w3 w4", tuple(expected), tuple(chat))
    assert prompt.answered("w5") == [*chat, {"role": "assistant", "content": "w5"}]
    own = [{"role": "system", "content": "w9"}, {"role": "user", "content": "w1"}]
    source = write(tmp_path / "c.jsonl", [{"chat": own}])
    (prompt,), _ = load_prompts(data(source, prompt_column="chat", system_prompt="be"), tokenizer, seed=0)
    assert prompt.token_ids == ids(tokenizer, "<system> w9 <end> <user> w1 <end> <assistant>")


def test_transcripts_are_asked_again_for_their_last_answer(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    turns = "\n\nHuman: w1\n\nAssistant: w2\n\nHuman: w3 w4\n\nAssistant:"
    doubled = "\n\nHuman: w1\n\nAssistant: w2\n\nAssistant: w3\n\nHuman: w4\n\nAssistant: w5"
    rows = [{"chosen": f"{turns} w5 w6"}, {"chosen": turns}, {"chosen": doubled}]
    first = write(tmp_path / "first.jsonl", rows)
    second = write(tmp_path / "second.jsonl", [{"chosen": "\n\nHuman: w7\n\nAssistant: w8"}])
    settings = data([str(first), str(second)], prompt_column="chosen", shuffle=False)
    prompts, _ = load_prompts(settings, tokenizer, seed=0)
    chat = [
        {"role": "user", "content": "w1"},
        {"role": "assistant", "content": "w2"},
        {"role": "user", "content": "w3 w4"},
    ]
    expected = tuple(tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_dict=False))
    assert prompts[0] == prompts[1].__class__(0, "w3 w4", expected, tuple(chat))
    assert prompts[1].messages == tuple(chat) and prompts[1].token_ids == expected
    # The malformed one is left out; one message of the user is a plain prompt.
    assert prompts[2:] == [Prompt(0, "w7", ids(tokenizer, "<user> w7 <end> <assistant>"))]


def test_raw_text_keeps_the_tokenizers_own_special_tokens(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    (prompt,), _ = load_prompts(
        data(numbered(tmp_path / "a.jsonl", 1), chat_template=False), tokenizer, seed=0
    )
    assert prompt.token_ids == ids(tokenizer, "<bos> w0")


@pytest.mark.parametrize("kind", ["jsonl", "json", "parquet", "directory", "jsonl.gz", "json.gz"])
def test_every_kind_of_local_source(tmp_path: Path, tokenizer: PreTrainedTokenizerFast, kind: str) -> None:
    table = Dataset.from_list([{"prompt": f"w{i}"} for i in range(5)])
    path = tmp_path / f"data.{kind}"
    if kind == "parquet":
        table.to_parquet(str(path))
    elif kind == "directory":
        path.mkdir()
        table.to_parquet(str(path / "train.parquet"))
    else:
        table.to_json(str(path))
    train, heldout = load_prompts(data(str(path), shuffle=False), tokenizer, seed=0)
    assert [p.text for p in train] == [f"w{i}" for i in range(5)]
    assert heldout == []


def test_long_and_empty_prompts_are_left_out_and_counted(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": "w1"}, {"prompt": "w1 w2 w3"}, {"prompt": "  "}, {"prompt": "w4 w5"}]
    source = write(tmp_path / "a.jsonl", rows)
    with caplog.at_level(logging.INFO):
        train, _ = load_prompts(data(source, max_prompt_tokens=5, shuffle=False), tokenizer, seed=0)
    assert [(p.index, p.text) for p in train] == [(0, "w1"), (3, "w4 w5")]
    assert "2 prompts, left out 1 longer than 5 tokens and 1 empty" in caplog.text
    with pytest.raises(ValueError, match=r"no prompt of .* is left of 4 rows, 3 longer than 3 tokens"):
        load_prompts(data(source, max_prompt_tokens=3), tokenizer, seed=0)


def test_order_depends_on_the_seed_only(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    config = data(numbered(tmp_path / "a.jsonl", 50), heldout_prompts=8)
    first, second, other = (load_prompts(config, tokenizer, seed=s) for s in (3, 3, 4))
    assert first == second
    assert first[0] != other[0] and first[1] != other[1]
    assert {p.index for p in first[0]} | {p.index for p in first[1]} == set(range(50))


def test_heldout_prompts_are_never_trained_on(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"w{i % 10}"} for i in range(40)]
    source = write(tmp_path / "a.jsonl", rows)
    train, heldout = load_prompts(data(source, heldout_prompts=4), tokenizer, seed=0)
    texts = [p.text for p in heldout]
    assert len(set(texts)) == 4
    assert len(train) == 24 and not {p.text for p in train} & set(texts)
    other = numbered(tmp_path / "b.jsonl", 3)
    train, heldout = load_prompts(data(source, heldout_source=other, heldout_prompts=9), tokenizer, seed=0)
    assert {p.text for p in heldout} == {"w0", "w1", "w2"}
    assert {p.text for p in train} == {f"w{i}" for i in range(3, 10)}
    with pytest.raises(ValueError, match=r"data.heldout_prompts: found 64, which leaves no training prompt"):
        load_prompts(data(source, heldout_prompts=64), tokenizer, seed=0)


def test_split_column(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    rows = [{"prompt": f"w{i}", "split": "test" if i % 4 == 0 else "train"} for i in range(12)]
    source = write(tmp_path / "a.jsonl", rows)
    config = data(source, heldout_source=source, heldout_prompts=64)
    train, heldout = load_prompts(config, tokenizer, seed=0)
    assert {p.text for p in heldout} == {"w0", "w4", "w8"}
    assert len(train) == 9
    with pytest.raises(ValueError, match=r"data.split: found 'dev', accepted for .*: test, train"):
        load_prompts(data(source, split="dev"), tokenizer, seed=0)


def test_errors_name_what_was_found(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    good = numbered(tmp_path / "a.jsonl", 2)
    (tmp_path / "empty.jsonl").touch()
    (tmp_path / "broken.jsonl").write_text("{not json\n")
    packed = gzip.compress((tmp_path / "a.jsonl").read_bytes())
    (tmp_path / "cut.jsonl.gz").write_bytes(packed[:-12])
    (tmp_path / "plain.json.gz").write_text('{"prompt": "w1"}\n')
    (tmp_path / "damaged.jsonl.gz").write_bytes(packed[:12] + b"\xff" * 9 + packed[21:])
    odd = write(tmp_path / "odd.jsonl", [{"prompt": [{"content": "w1"}]}])
    role = write(
        tmp_path / "role.jsonl",
        [{"prompt": [{"role": "user", "content": "w1"}, {"role": "tool", "content": "x"}]}],
    )
    refused = write(tmp_path / "refused.jsonl", [{"prompt": "w199"}])
    cases: list[tuple[DataConfig, str]] = [
        (data(str(tmp_path / "absent.jsonl")), "data.source: file .*absent.jsonl' not found"),
        (data(good, heldout_source="x.json", heldout_prompts=1), "data.heldout_source: file"),
        (data(str(tmp_path / "empty.jsonl")), "empty.jsonl' is empty"),
        (data(str(tmp_path / "broken.jsonl")), "broken.jsonl' not readable as .jsonl"),
        (data(str(tmp_path / "cut.jsonl.gz")), "cut.jsonl.gz' not readable as .jsonl.gz: "),
        (data(str(tmp_path / "plain.json.gz")), "plain.json.gz' not readable as .json.gz: "),
        (data(str(tmp_path / "damaged.jsonl.gz")), "damaged.jsonl.gz' not readable as .jsonl.gz: "),
        (data(good, prompt_column="text"), "data.prompt_column: found 'text', accepted for .*: prompt"),
        (data("package:nothing"), "data.source: found 'package:nothing', accepted: "),
        (data(odd), "row 1: found .* accepted: a string or a list"),
        (data(role), "row 1: found the role 'tool' in message 2 of 'prompt', accepted: system, user"),
        (data(refused), "row 1: the chat template of model.path refuses it: no w199"),
        (data(role, chat_template=False), "row 1: found a list of messages, which needs data.chat_template"),
        (data(good, chat_template=False, system_prompt="x"), "data.system_prompt: found a text"),
        (data(str(tmp_path / "nowhere")), r"nowhere', accepted: a hub name, a file ending in .*\.jsonl\.gz"),
    ]  # fmt: skip
    for config, message in cases:
        with pytest.raises(ValueError, match=message):
            load_prompts(config, tokenizer, seed=0)
    bare = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer)
    with pytest.raises(ValueError, match=r"data.chat_template: found true, but the tokenizer"):
        load_prompts(data(good), bare, seed=0)


def stream(count: int) -> list[Prompt]:
    return [Prompt(i, str(i), (i,)) for i in range(count)]


def position(count: int, prompts_per_step: int, seed: int, step: int, shuffle: bool = True) -> PromptPosition:
    order = Order(count, prompts_per_step, 0, 1, seed, shuffle=shuffle, wording=PROMPTS)
    return PromptPosition.of(stream(count), order, step)


def test_positions_are_those_that_checkpoints_hold() -> None:
    """Recorded: the checkpoints of earlier runs are resumed."""
    assert asdict(position(5, 2, seed=7, step=5, shuffle=False)) == {
        "step": 5,
        "prompts_per_step": 2,
        "prompts": "7ecd968784c827e5",
    }
    assert position(11, 4, seed=5, step=3).prompts == "ce9c6118862ec563"
    assert position(11, 4, seed=6, step=0).prompts == "769a8d0ef9247051"


def test_a_position_in_other_prompts_is_refused() -> None:
    saved = PromptPosition(**json.loads(json.dumps(asdict(position(20, 4, seed=1, step=7)))))
    position(20, 4, seed=1, step=0).check_same_prompts(saved)
    for other in (
        position(21, 4, seed=1, step=7),
        position(20, 4, seed=2, step=7),
        position(20, 4, seed=1, step=7, shuffle=False),
    ):
        with pytest.raises(
            ValueError, match=r"^data or seed: the checkpoint was written with other prompts \(prompts "
        ):
            other.check_same_prompts(saved)
    with pytest.raises(
        ValueError,
        match=r"^rollout.prompts_per_step: the checkpoint was written with other prompts "
        r"\(prompts_per_step 4, found 2\); accepted: the configuration of the run that is resumed, or "
        r"checkpoint.resume=false$",
    ):
        position(20, 2, seed=1, step=7).check_same_prompts(saved)


COLUMNS = {"answer": "objective 'correct': columns"}


def test_prompts_keep_the_columns_that_objectives_read(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, caplog: pytest.LogCaptureFixture
) -> None:
    rows = [{"prompt": f"w{i}", "answer": [i], "other": "x"} for i in range(3)] + [{"prompt": "w9"}]
    settings = data(write(tmp_path / "a.jsonl", rows), heldout_prompts=1, shuffle=False)
    with caplog.at_level(logging.INFO, logger="gapo_mega"):
        train, heldout = load_prompts(settings, tokenizer, 0, COLUMNS)
    assert [prompt.columns for prompt in heldout + train] == [
        {"answer": [0]},
        {"answer": [1]},
        {"answer": [2]},
        {"answer": None},
    ]
    assert "1 of 4 prompts have no value in column 'answer'" in caplog.text
    assert "columns that are not read: other" in caplog.text
    assert load_prompts(settings, tokenizer, 0)[0][0].columns == {}


@pytest.mark.parametrize("parameter", ["source", "heldout_source"])
def test_a_column_that_is_not_there_names_objective_file_and_columns(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast, parameter: str
) -> None:
    good = write(tmp_path / "good.jsonl", [{"prompt": "w1", "answer": 1}, {"prompt": "w2", "answer": 1}])
    bad = write(tmp_path / "bad.jsonl", [{"prompt": "w3", "reply": 1}])
    sources = {"source": good, "heldout_source": good, parameter: bad}
    settings = DataConfig.model_validate({**sources, "heldout_prompts": 1})
    with pytest.raises(ValueError) as caught:
        load_prompts(settings, tokenizer, 0, COLUMNS)
    assert str(caught.value) == (
        f"objective 'correct': columns: found 'answer', accepted for '{bad}': prompt, reply"
    )


def test_columns_of_a_data_set_directory_and_of_parquet(
    tmp_path: Path, tokenizer: PreTrainedTokenizerFast
) -> None:
    table = Dataset.from_list([{"prompt": "w1", "answer": {"x": 1}}, {"prompt": "w2", "answer": None}])
    table.save_to_disk(str(tmp_path / "saved"))
    table.to_parquet(str(tmp_path / "a.parquet"))
    for source in ("saved", "a.parquet"):
        train, _ = load_prompts(data(str(tmp_path / source), shuffle=False), tokenizer, 0, COLUMNS)
        assert [prompt.columns for prompt in train] == [{"answer": {"x": 1}}, {"answer": None}]
