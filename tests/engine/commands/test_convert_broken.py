"""Model files that are broken: one error that names the file, and nothing written."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from gapo_mega.engine.megatron.checkpoint import convert
from tests.helpers.hf_directories import language_model

LFS_POINTER = "version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 5\n"


@pytest.mark.parametrize(
    ("file", "content", "message"),
    [
        ("model.safetensors", LFS_POINTER, r"model\.safetensors cannot be read .*whole safetensors file"),
        ("model.safetensors.index.json", "{}", r"index\.json is no index of weights"),
        ("model.safetensors.index.json", "{", r"index\.json is no index of weights"),
        ("config.json", "{", r"model\.path: found .*hf', accepted: .* a sound configuration"),
        ("config.json", '{"model_type": "llama", "num_attention_heads": 0}', r"a sound configuration"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}', r"a sound configuration"),
        (
            "config.json",
            '{"model_type": "mine", "auto_map": {"AutoConfig": "mine.Config"}}',
            r"a sound configuration",
        ),
    ],
)
def test_broken_files_are_named(tmp_path: Path, file: str, content: str, message: str) -> None:
    source = language_model(tmp_path / "hf")
    (source / file).write_text(content)
    with pytest.raises(ValueError, match=message):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_pickled_weights_of_any_age_and_broken_ones(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    for zipped in (True, False):  # before PyTorch 1.6 they were no zip files
        torch.save(tensors, source / "pytorch_model.bin", _use_new_zipfile_serialization=zipped)
        convert.to_checkpoint(source, tmp_path / f"ckpt{zipped}")
        convert.to_hf(tmp_path / f"ckpt{zipped}", tmp_path / f"back{zipped}")
        back = load_file(tmp_path / f"back{zipped}" / "model.safetensors")
        assert back.keys() == tensors.keys()
        assert all(torch.equal(back[name], value) for name, value in tensors.items())
    content = (source / "pytorch_model.bin").read_bytes()
    (source / "pytorch_model.bin").write_bytes(content[: len(content) // 2])
    with pytest.raises(ValueError, match=r"pytorch_model\.bin cannot be read"):
        convert.to_checkpoint(source, tmp_path / "cut")


def test_a_checkpoint_that_lost_a_file_is_refused(tmp_path: Path) -> None:
    convert.to_checkpoint(language_model(tmp_path / "hf"), tmp_path / "ckpt")
    (tmp_path / "ckpt" / "common.pt").unlink()
    with pytest.raises(ValueError, match=r"its common\.pt cannot be read"):
        convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
