"""What ``sft`` and ``train-reward`` refuse before data are read: models and tokenizers that do not fit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.config import ParallelConfig
from gapo_mega.config.supervised import RewardModelConfig, SftConfig
from gapo_mega.runs.data_run import check
from tests.helpers.hf_directories import classifier
from tests.helpers.tiny import byte_tokenizer, tiny_llama

KINDS: list[Any] = [SftConfig, RewardModelConfig]


def settings(kind: Any, model: Path) -> Any:
    return kind.model_validate(
        {
            "output_dir": "unused",
            "batch_size": 8,
            "model": {"path": str(model), "max_tokens": 20, "chat_template": "{{ messages[-1].content }}"},
            "data": {"source": "unused"},
            "logging": {"tensorboard": False},
        }
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_model_without_a_row_for_every_token(kind: Any, tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    byte_tokenizer(tmp_path)
    check(settings(kind, tmp_path), 1)
    (tmp_path / "added_tokens.json").write_text('{"<new>": 101}')
    with pytest.raises(
        ValueError, match=r"^model\.path: .* the token '<new>' with the id 101, accepted: 0 to 100"
    ):
        check(settings(kind, tmp_path), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_padding_id_without_a_row(kind: Any, tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    byte_tokenizer(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "pad_token_id": 101}))
    with pytest.raises(
        ValueError, match=r"^model\.path: .*config\.json pad_token_id: found 101, accepted: null, or"
    ):
        check(settings(kind, tmp_path), 1)


def test_a_classifier_is_trained_as_a_reward_model_only(tmp_path: Path) -> None:
    classifier(tmp_path)
    byte_tokenizer(tmp_path)
    check(settings(RewardModelConfig, tmp_path), 1)
    with pytest.raises(
        ValueError, match=r"^model\.path: found the score model LlamaForSequenceClassification, acc"
    ):
        check(settings(SftConfig, tmp_path), 1)


@pytest.mark.parametrize("kind", KINDS)
def test_an_interleaved_pipeline_needs_a_microbatch_for_every_stage(kind: Any, tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    byte_tokenizer(tmp_path)
    plain = settings(kind, tmp_path)
    parallel = ParallelConfig(pipeline=2, virtual_pipeline=2)
    check(plain.model_copy(update={"parallel": parallel, "micro_batch_size": 4}), 2)
    with pytest.raises(
        ValueError,
        match=r"^parallel\.virtual_pipeline: found 2 with 1 microbatches .* at least 2 ",
    ):
        check(plain.model_copy(update={"parallel": parallel}), 2)
    four = ParallelConfig(pipeline=2, virtual_pipeline=4)
    with pytest.raises(
        ValueError, match=r"^parallel\.virtual_pipeline: found 4, accepted for the 2 layers .* stage: 1, 2$"
    ):
        check(plain.model_copy(update={"parallel": four, "micro_batch_size": 4}), 2)
