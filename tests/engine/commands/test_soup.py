"""Checkpoints are merged like the directories that they were made of."""

from __future__ import annotations

from pathlib import Path

import pytest

from gapo_mega.commands.soup import soup
from gapo_mega.engine.megatron.checkpoint import convert
from tests.helpers.hf_directories import assert_same_model, language_model


@pytest.mark.parametrize("tied", [False, True])
def test_a_checkpoint_and_a_directory_are_merged(tmp_path: Path, tied: bool) -> None:
    a = language_model(tmp_path / "a", tied=tied, seed=0)
    b = language_model(tmp_path / "b", tied=tied, seed=1)
    for source in (a, b):
        (source / "tokenizer.json").unlink()  # it stands for any file, and is no tokenizer
    convert.to_checkpoint(b, tmp_path / "checkpoint", tensor=2)
    soup([str(a), str(b)], tmp_path / "expected", "0.3,0.7")
    soup([str(a), str(tmp_path / "checkpoint")], tmp_path / "out", "0.3,0.7")
    assert_same_model(tmp_path / "out", tmp_path / "expected")
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
