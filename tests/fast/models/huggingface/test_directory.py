"""Hugging Face directories: read as transformers wrote them, written as transformers reads them."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.models import HFDirectory, write_hf
from gapo_mega.models.huggingface.location import resolve
from tests.helpers.tiny import tiny_llama


def tensors_of(source: HFDirectory) -> Iterator[tuple[str, Tensor]]:
    return ((name, source.read(name)) for name in sorted(source.names))


def promised(source: HFDirectory) -> dict[str, Tensor]:
    return {name: source.like(name) for name in sorted(source.names)}


def test_sharded_and_single_files_read_the_same(tmp_path: Path) -> None:
    model = tiny_llama(tmp_path / "single")
    model.save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 2
    single, sharded = HFDirectory(tmp_path / "single"), HFDirectory(tmp_path / "sharded")
    assert single.names == sharded.names == model.state_dict().keys()
    for name, expected in model.state_dict().items():
        assert torch.equal(single.read(name), expected)
        assert torch.equal(sharded.read(name), expected)


@pytest.mark.parametrize("shard_bytes", [1 << 30, 50_000])
def test_what_is_written_transformers_loads(tmp_path: Path, shard_bytes: int) -> None:
    model = tiny_llama(tmp_path / "source")
    (tmp_path / "source" / "chat_template.jinja").write_text("{{ messages }}")
    source = HFDirectory(tmp_path / "source")
    write_hf(tmp_path / "copy", source.path, promised(source), tensors_of(source), shard_bytes=shard_bytes)
    assert (tmp_path / "copy" / "model.safetensors").exists() == (shard_bytes == 1 << 30)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "copy")
    for name, expected in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], expected), name
    assert (tmp_path / "copy" / "chat_template.jinja").read_text() == "{{ messages }}"


def test_configuration_follows_the_type_of_the_tensors(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source")
    source = HFDirectory(tmp_path / "source")
    rounded = ((name, tensor.bfloat16()) for name, tensor in tensors_of(source))
    halves = {name: like.bfloat16() for name, like in promised(source).items()}
    write_hf(tmp_path / "copy", source.path, halves, rounded)
    assert json.loads((tmp_path / "copy" / "config.json").read_text())["dtype"] == "bfloat16"
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "copy", dtype="auto").dtype == torch.bfloat16


def test_a_write_that_fails_leaves_nothing(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source")
    source = HFDirectory(tmp_path / "source")

    def failing() -> Iterator[tuple[str, Tensor]]:
        yield next(iter(tensors_of(source)))
        raise OSError("connection lost")

    with pytest.raises(ValueError, match="copy was not written: connection lost"):
        write_hf(tmp_path / "copy", source.path, promised(source), failing())
    assert [path.name for path in tmp_path.iterdir()] == ["source"]


def test_an_existing_directory_is_replaced_only_on_demand(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source")
    source = HFDirectory(tmp_path / "source")
    (tmp_path / "copy").mkdir()
    (tmp_path / "copy" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists already"):
        write_hf(tmp_path / "copy", source.path, promised(source), tensors_of(source))
    assert (tmp_path / "copy" / "notes.txt").exists()
    write_hf(tmp_path / "copy", source.path, promised(source), tensors_of(source), overwrite=True)
    assert not (tmp_path / "copy" / "notes.txt").exists()
    assert HFDirectory(tmp_path / "copy").names == source.names


def test_a_link_is_replaced_and_what_lies_behind_it_stays(tmp_path: Path) -> None:
    tiny_llama(tmp_path / "source")
    source = HFDirectory(tmp_path / "source")
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "notes.txt").write_text("mine")
    (tmp_path / "copy").symlink_to(tmp_path / "disk")
    write_hf(tmp_path / "copy", source.path, promised(source), tensors_of(source), overwrite=True)
    assert not (tmp_path / "copy").is_symlink() and HFDirectory(tmp_path / "copy").names == source.names
    assert sorted(path.name for path in tmp_path.iterdir()) == ["copy", "disk", "source"]
    assert (tmp_path / "disk" / "notes.txt").read_text() == "mine"


def test_incomplete_directories_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"has no config\.json"):
        HFDirectory(tmp_path)
    tiny_llama(tmp_path / "source").save_pretrained(tmp_path / "sharded", max_shard_size="50KB")
    (tmp_path / "source" / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"neither model\.safetensors nor"):
        HFDirectory(tmp_path / "source")
    lost = sorted((tmp_path / "sharded").glob("*.safetensors"))[0]
    lost.unlink()
    with pytest.raises(ValueError, match=lost.name):
        HFDirectory(tmp_path / "sharded")


@pytest.mark.parametrize("name", ["/no/such/directory", "nobody/no-such-model"])
def test_a_model_that_is_nowhere_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match=rf"model\.path: found '{name}', which is neither a local directory"):
        resolve(name)


def test_a_local_directory_is_itself(tmp_path: Path) -> None:
    assert resolve(tmp_path) == tmp_path
