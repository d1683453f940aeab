"""The first rows of every source: what is told, what is refused, and what is not read."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import DataConfig
from gapo_mega.config.supervised import RewardModelConfig, SftConfig
from gapo_mega.data.preview import ROWS, preview_prompts, preview_supervised
from tests.helpers.small_tokenizers import TEMPLATE, word_tokenizer


def tokenizer() -> Any:
    return word_tokenizer(chat_template=TEMPLATE)


def unwanted() -> Any:
    raise AssertionError("no tokenizer is needed")


def write(path: Path, rows: list[dict[str, Any]], then: str = "") -> str:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + then)
    return str(path)


def test_prompts(tmp_path: Path) -> None:
    many = write(tmp_path / "a.jsonl", [{"prompt": "w1"}] * ROWS, then="{broken")
    few = write(tmp_path / "b.jsonl", [{"prompt": "w2"}, {"prompt": ""}])
    hub = "some-org/prompts"
    data = DataConfig(source=[many, hub, few], heldout_source=few)
    assert preview_prompts(data, tokenizer) == [
        f"data.source '{many}' (data.split 'train'): checked {ROWS} usable rows of the first {ROWS}",
        f"data.source '{hub}' (data.split 'train'): not checked, since it is no local file or directory and "
        "the hub was not asked",
        f"data.source '{few}' (data.split 'train'): checked 1 usable rows of the first 2",
        f"data.heldout_source '{few}' (data.split 'test'): checked 1 usable rows of the first 2".replace(
            "data.split", "data.heldout_split"
        ),
    ]
    assert len(preview_prompts(DataConfig(source=hub), unwanted)) == 1
    assert len(preview_prompts(DataConfig(source="package:prompts"), tokenizer)) == 1


def test_rows_are_read_until_one_can_be_used(tmp_path: Path) -> None:
    late = write(tmp_path / "a.jsonl", [{"prompt": ""}] * 40 + [{"prompt": "w1"}])
    assert preview_prompts(DataConfig(source=late), tokenizer)[0].endswith(
        "checked 1 usable rows of the first 41"
    )
    with pytest.raises(
        ValueError, match=r"^data.source '.*: found no usable row in 40 \(left out: .*40 empty"
    ):
        preview_prompts(DataConfig(source=write(tmp_path / "b.jsonl", [{"prompt": ""}] * 40)), tokenizer)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"source": "absent.jsonl"}, "^data.source: file .* not found"),
        ({"source": "/no/where"}, "^data.source: found '/no/where', accepted: "),
        ({"heldout_source": "absent.jsonl"}, "^data.heldout_source: file .* not found"),
        (
            {"heldout_prompts": 0, "heldout_source": "absent.jsonl", "prompt_column": "x"},
            "^data.prompt_column",
        ),
        ({"prompt_column": "text"}, "^data.prompt_column: found 'text', accepted for .*: n, prompt"),
        ({"prompt_column": "n"}, "row 1: found 3 in 'n', accepted: a string or a list"),
        ({"source": "package:nothing"}, "^data.source: found 'package:nothing'"),
        ({"subset": "x"}, "^data.subset: found 'x' with the file"),
        ({"system_prompt": "x", "chat_template": False}, "^data.system_prompt: found a text"),
    ],
)
def test_what_a_run_would_refuse(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    good = write(tmp_path / "a.jsonl", [{"prompt": "w1", "n": 3}])
    with pytest.raises(ValueError, match=message):
        preview_prompts(DataConfig.model_validate({"source": good, **changes}), tokenizer)


def test_supervised_rows(tmp_path: Path) -> None:
    base = {"output_dir": "o", "model": {"path": "m"}}
    chats = write(tmp_path / "a.jsonl", [{"prompt": "w1", "response": "w2"}] * 20, then="{broken")
    pairs = write(tmp_path / "b.jsonl", [{"prompt": "w1", "chosen": "w2", "rejected": "w3"}])
    for kind, source in ((SftConfig, chats), (RewardModelConfig, pairs)):
        data = {"source": source, "heldout_source": source}
        lines = preview_supervised(kind.model_validate({**base, "data": data}), tokenizer)
        assert [line.split("'")[0] for line in lines] == ["data.source ", "data.heldout_source "]
        wrong = kind.model_validate(
            {**base, "data": {"source": source, "format": "columns", "prompt_column": "q"}}
        )
        with pytest.raises(ValueError, match=r"^data.prompt_column: found 'q'"):
            preview_supervised(wrong, tokenizer)
        refusing = {"path": "m", "chat_template": "{{ raise_exception('no') }}"}
        with pytest.raises(
            ValueError, match=r"^model.chat_template: refuses a conversation of user, assistant"
        ):
            preview_supervised(kind.model_validate({**base, "data": data, "model": refusing}), tokenizer)


def test_the_columns_of_objectives_are_checked(tmp_path: Path) -> None:
    data = DataConfig(source=write(tmp_path / "a.jsonl", [{"prompt": "w1", "answer": 1}]))
    columns = {"answer": "objective 'a': columns", "reply": "objective 'b': columns"}
    with pytest.raises(
        ValueError, match=r"^objective 'b': columns: found 'reply', accepted for .*: answer, p"
    ):
        preview_prompts(data, tokenizer, columns)
