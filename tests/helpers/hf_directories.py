"""Hugging Face directories to convert, and whether two hold the same model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from transformers import LlamaForSequenceClassification

from tests.helpers.tiny import tiny_llama

COMPANIONS = {
    "generation_config.json": '{"eos_token_id": [2, 7],   "temperature": 0.6}',
    "tokenizer.json": "{}",
    "chat_template.jinja": "{{ messages }}",
    "LICENSE": "as before",
}


def language_model(directory: Path, **options: Any) -> Path:
    tiny_llama(directory, **{"vocab": 101, **options})
    for name, text in COMPANIONS.items():
        (directory / name).write_text(text)
    return directory


def classifier(directory: Path) -> Path:
    config = tiny_llama(directory, vocab=101).config
    config.num_labels = 1
    LlamaForSequenceClassification(config).float().save_pretrained(directory)
    return directory


def files_of(directory: Path) -> dict[str, bytes]:
    """Content of everything but the weights."""
    return {f.name: f.read_bytes() for f in directory.iterdir() if f.suffix != ".safetensors"}


def assert_same_model(found: Path, expected: Path) -> None:
    one, other = load_file(found / "model.safetensors"), load_file(expected / "model.safetensors")
    assert one.keys() == other.keys()
    for name, tensor in other.items():
        assert one[name].dtype == tensor.dtype and torch.equal(one[name], tensor), name
    assert files_of(found) == files_of(expected)
