"""Model files that are broken: one error that names the file, and nothing written."""

from __future__ import annotations

import json
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


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_hidden_layers": 3}, r"does not have: .*model\.layers\.3\."),
        ({"num_hidden_layers": 5}, r"tensors missing: .*model\.layers\.4\."),
        (
            {"vocab_size": 100},
            r"embed_tokens\.weight: found the shape \[101, 72\], config\.json promises \[100, ",
        ),
        (
            {"vocab_size": 104},
            r"embed_tokens\.weight: found the shape \[101, 72\], config\.json promises \[104, ",
        ),
        (
            {"num_key_value_heads": 4},
            r"k_proj\.weight: found the shape \[32, 72\], config\.json promises \[64, ",
        ),
        ({"head_dim": 8}, r"q_proj\.weight: found the shape"),
        ({"tie_word_embeddings": True}, r"lm_head\.weight differs from model\.embed_tokens\.weight"),
    ],
)
def test_a_configuration_of_other_weights_is_refused(
    tmp_path: Path, changes: dict[str, object], message: str
) -> None:
    source = language_model(tmp_path / "hf")
    file = source / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))
    with pytest.raises(ValueError, match=message):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


@pytest.mark.parametrize("form", ["hf", "ckpt"])
def test_a_target_that_holds_the_source_is_refused(tmp_path: Path, form: str) -> None:
    language_model(tmp_path / "in" / "hf")
    convert.to_checkpoint(tmp_path / "in" / "hf", tmp_path / "in" / "ckpt")
    write = {"hf": convert.to_checkpoint, "ckpt": convert.to_hf}[form]
    for target in (tmp_path / "in" / form, tmp_path / "in"):
        with pytest.raises(ValueError, match=r"^--to: found .*, which holds "):
            write(tmp_path / "in" / form, target, overwrite=True)
    assert sorted(path.name for path in (tmp_path / "in").iterdir()) == ["ckpt", "hf"]
