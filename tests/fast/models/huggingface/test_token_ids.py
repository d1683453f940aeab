"""Token ids: all have a row of the embedding, and those that end a response are transformers' own."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

from gapo_mega.models.huggingface.token_ids import check_named_ids, check_vocabulary, end_of_sequence_ids
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from tests.helpers.tiny import byte_tokenizer, tiny_llama

VOCAB = 101  # of the tokenizer, too: its ids are 0 to 100, its end is 2


@pytest.fixture
def model(tmp_path: Path) -> Path:
    tiny_llama(tmp_path / "model", vocab=VOCAB)
    byte_tokenizer(tmp_path / "model")
    return tmp_path / "model"


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_embedding_larger_than_the_tokenizer_is_fine(model: Path) -> None:
    for vocab in (VOCAB, VOCAB + 1, 128):
        check_vocabulary(read_tokenizer(model), vocab)


def add_token(tokenizer: PreTrainedTokenizerBase) -> str:
    tokenizer.add_tokens(["<new>"])
    return "<new>"


def add_padding(tokenizer: PreTrainedTokenizerBase) -> str:
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    return r"\[PAD\]"


@pytest.mark.parametrize("add", [add_token, add_padding])
def test_an_added_token_without_a_row_is_refused(model: Path, add: Any) -> None:
    tokenizer = AutoTokenizer.from_pretrained(model)
    token = add(tokenizer)
    tokenizer.save_pretrained(model)
    message = (
        rf"^model\.path: the tokenizer of .* has the token '{token}' with the id 101, accepted: 0 to 100 "
    )
    with pytest.raises(ValueError, match=message) as caught:
        check_vocabulary(read_tokenizer(model), VOCAB)
    assert "\n" not in str(caught.value)
    check_vocabulary(read_tokenizer(model), VOCAB + 1)


def test_old_files_of_added_tokens_count(model: Path) -> None:
    (model / "added_tokens.json").write_text('{"<new>": 101, "<newer>": 102}')
    with pytest.raises(ValueError, match=r"'<new>' with the id 101 and 1 others"):
        check_vocabulary(read_tokenizer(model), VOCAB)


def test_a_vocabulary_larger_than_the_embedding_is_refused(model: Path) -> None:
    tokenizer = read_tokenizer(model)
    last = tokenizer.convert_ids_to_tokens(100)
    with pytest.raises(ValueError, match=r"with the id 100, accepted: 0 to 99") as caught:
        check_vocabulary(tokenizer, 100)
    assert repr(last) in str(caught.value)


def test_ids_that_only_a_post_processor_writes_count(model: Path) -> None:
    tokenizer: Any = AutoTokenizer.from_pretrained(model)
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="[BOS] $A", special_tokens=[("[BOS]", 101)]
    )
    with pytest.raises(ValueError, match=r"gives 'a' the ids \[101, .*\], accepted: 0 to 100"):
        check_vocabulary(tokenizer, VOCAB)


@pytest.mark.parametrize("file", ["config.json", "generation_config.json"])
@pytest.mark.parametrize("field", ["bos_token_id", "eos_token_id", "pad_token_id", "unk_token_id"])
@pytest.mark.parametrize("found", [101, -2, True, 1.0, "2", [[1]]])
def test_named_ids_outside_the_vocabulary_are_refused(
    model: Path, file: str, field: str, found: object
) -> None:
    check_named_ids(model, VOCAB)
    edited(model / file, **{field: found})
    with pytest.raises(
        ValueError, match=rf"^model\.path: .*{file} {field}: found .*, accepted: null, or 0 to 100"
    ):
        check_named_ids(model, VOCAB)


@pytest.mark.parametrize("found", [None, 0, 100])
def test_named_ids_within_the_vocabulary_are_taken(model: Path, found: int | None) -> None:
    for field in ("bos_token_id", "eos_token_id", "pad_token_id"):
        edited(model / "config.json", **{field: found})
        edited(model / "generation_config.json", **{field: found})
    edited(model / "config.json", eos_token_id=[2, 100])
    check_named_ids(model, VOCAB)
    edited(model / "config.json", eos_token_id=[2, 101])
    with pytest.raises(ValueError, match=r"eos_token_id: found \[2, 101\]"):
        check_named_ids(model, VOCAB)


def test_minus_one_is_no_padding_and_nothing_else(model: Path) -> None:
    edited(model / "config.json", pad_token_id=-1)
    check_named_ids(model, VOCAB)
    edited(model / "config.json", eos_token_id=-1)
    with pytest.raises(ValueError, match="eos_token_id: found -1"):
        check_named_ids(model, VOCAB)


ABSENT = object()


@pytest.mark.parametrize("in_generation", [ABSENT, 2, 7, [2, 7], [7, 2, 7], [9]])
@pytest.mark.parametrize("in_config", [2, [2, 7], [5]])
def test_responses_end_where_generate_of_transformers_ends_them(
    model: Path, in_config: object, in_generation: object
) -> None:
    edited(model / "config.json", eos_token_id=in_config)
    if in_generation is ABSENT:
        (model / "generation_config.json").unlink()
    else:
        edited(model / "generation_config.json", eos_token_id=in_generation)
    expected = AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id
    found = end_of_sequence_ids(model, read_tokenizer(model))
    assert set(found) == ({expected} if isinstance(expected, int) else set(expected))
    assert len(found) == len(set(found))


@pytest.mark.parametrize("in_generation", [ABSENT, None, []])
def test_ends_of_the_configuration_count_where_generation_settings_name_none(
    model: Path, in_generation: object
) -> None:
    """As in a generation_config.json that has a temperature alone: transformers would never stop there."""
    edited(model / "config.json", eos_token_id=[2, 7])
    if in_generation is ABSENT:
        (model / "generation_config.json").write_text('{"temperature": 0.6, "do_sample": true}')
    else:
        edited(model / "generation_config.json", eos_token_id=in_generation)
    assert AutoModelForCausalLM.from_pretrained(model).generation_config.eos_token_id in (None, [])
    assert end_of_sequence_ids(model, read_tokenizer(model)) == [2, 7]


def test_the_tokenizer_s_end_is_taken_where_the_model_names_none(model: Path) -> None:
    for file in ("config.json", "generation_config.json"):
        edited(model / file, eos_token_id=None)
    tokenizer = read_tokenizer(model)
    assert end_of_sequence_ids(model, tokenizer) == [2]
    (model / "generation_config.json").unlink()
    assert end_of_sequence_ids(model, tokenizer) == [2]
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match=r"^model\.path: .* names no end-of-sequence token"):
        end_of_sequence_ids(model, tokenizer)


def test_a_tokenizer_whose_end_does_not_count_is_said(model: Path, caplog: pytest.LogCaptureFixture) -> None:
    edited(model / "generation_config.json", eos_token_id=[7])
    with caplog.at_level(logging.WARNING):
        assert end_of_sequence_ids(model, read_tokenizer(model)) == [7]
    assert (
        "responses end at the ids [7] of generation_config.json; the tokenizer's own end '</s>' (2)"
        in caplog.text
    )


def test_settings_that_are_no_json_are_one_line(model: Path) -> None:
    (model / "generation_config.json").write_text("{")
    for ask in (
        lambda: end_of_sequence_ids(model, read_tokenizer(model)),
        lambda: check_named_ids(model, VOCAB),
    ):
        with pytest.raises(ValueError, match=r"generation_config\.json cannot be read") as caught:
            ask()
        assert "\n" not in str(caught.value)
