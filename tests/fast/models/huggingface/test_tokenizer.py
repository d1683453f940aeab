"""Tokenizers that come with code: refused, and the code is not run."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest
from transformers import AutoTokenizer

from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from tests.helpers.tiny import byte_tokenizer, tiny_llama


def test_code_of_a_tokenizer_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not even where somebody who answers yes to everything sits at the terminal."""
    directory = tmp_path / "model"
    tiny_llama(directory)
    byte_tokenizer(directory)
    assert read_tokenizer(directory).vocab_size > 0
    ran = tmp_path / "ran"
    (directory / "own.py").write_text(f"open({str(ran)!r}, 'w')\nclass Own: pass\n")
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings |= {"tokenizer_class": "Own", "auto_map": {"AutoTokenizer": ["own.Own", None]}}
    path.write_text(json.dumps(settings))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 20))
    with pytest.raises(
        ValueError, match=r"^model\.path: found .*model.*, accepted: a directory or hub name with a tokenizer"
    ):
        read_tokenizer(directory)
    assert not ran.exists()


def test_no_tokenizer_is_one_line(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"^model\.path: found .*nothing") as caught:
        read_tokenizer(tmp_path / "nothing")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["LlamaTokenizer", "Qwen2Tokenizer", "GPT2Tokenizer"])
def test_a_tokenizer_whose_vocabulary_is_missing_is_refused(tmp_path: Path, kind: str) -> None:
    """transformers makes one of the special tokens alone, which turns every text into nothing."""
    directory = tmp_path / "model"
    tiny_llama(directory)
    byte_tokenizer(directory)
    (directory / "tokenizer.json").unlink()
    path = directory / "tokenizer_config.json"
    settings = json.loads(path.read_text())
    settings.pop("backend", None)
    path.write_text(json.dumps({**settings, "tokenizer_class": kind}))
    assert AutoTokenizer.from_pretrained(directory)("hello world")["input_ids"] == []
    with pytest.raises(ValueError, match=r"^model\.path: .* has no tokens but special ones, accepted: "):
        read_tokenizer(directory)
