"""Of several files with weights, the one that transformers takes; what contradicts itself is refused."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.models import HFDirectory
from tests.helpers.tiny import tiny_llama

NAME = "model.layers.2.mlp.up_proj.weight"
SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
PICKLED, PICKLED_INDEX = "pytorch_model.bin", "pytorch_model.bin.index.json"
KINDS = (SINGLE, INDEX, PICKLED, PICKLED_INDEX)


def add(directory: Path, kind: str, mark: float) -> None:
    """Weights of this kind, with ``mark`` in all of one tensor."""
    tensors = {name: value.clone() for name, value in tiny_llama_tensors(directory).items()}
    tensors[NAME] = torch.full_like(tensors[NAME], mark)
    if kind == SINGLE:
        save_file(tensors, directory / SINGLE, metadata={"format": "pt"})
    elif kind == PICKLED:
        torch.save(tensors, directory / PICKLED)
    else:
        shards(directory, kind, tensors)


def tiny_llama_tensors(directory: Path) -> dict[str, Tensor]:
    stock = directory.parent / "stock"
    if not stock.is_dir():
        tiny_llama(stock)
    if not (directory / "config.json").is_file():
        directory.mkdir()
        (directory / "config.json").write_text((stock / "config.json").read_text())
    return load_file(stock / SINGLE)


def shards(directory: Path, kind: str, tensors: dict[str, Tensor]) -> None:
    names = sorted(tensors)
    ending = "safetensors" if kind == INDEX else "bin"
    halves = {f"part-{i}.{ending}": names[i::2] for i in range(2)}
    for file, held in halves.items():
        some = {name: tensors[name] for name in held}
        if kind == INDEX:
            save_file(some, directory / file, metadata={"format": "pt"})
        else:
            torch.save(some, directory / file)
    listed = {name: file for file, held in halves.items() for name in held}
    (directory / kind).write_text(json.dumps({"metadata": {}, "weight_map": listed}))


def of_transformers(directory: Path) -> dict[str, Tensor]:
    found: dict[str, Tensor] = AutoModelForCausalLM.from_pretrained(directory).state_dict()
    return found


@pytest.mark.parametrize("first", range(4))
@pytest.mark.parametrize("second", range(4))
def test_the_file_is_the_one_that_transformers_takes(first: int, second: int, tmp_path: Path) -> None:
    source = tmp_path / "model"
    for mark, kind in ((1.0, KINDS[first]), (2.0, KINDS[second])):
        add(source, kind, mark)
    expected, found = of_transformers(source), HFDirectory(source)
    assert found.names == expected.keys()
    assert all(torch.equal(found.read(name), value) for name, value in expected.items())


def test_an_index_beside_a_single_file_is_said(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for mark, kind in ((1.0, SINGLE), (2.0, INDEX)):
        add(tmp_path / "model", kind, mark)
    with caplog.at_level(logging.WARNING):
        assert float(HFDirectory(tmp_path / "model").read(NAME)[0, 0]) == 1.0
    assert f"reads {SINGLE}, as transformers does; {INDEX} is not used" in caplog.text


@pytest.mark.parametrize(
    "other", ["consolidated.safetensors", "model.fp16.safetensors", "part-9.safetensors"]
)
def test_other_files_are_not_read_where_transformers_does_not(other: str, tmp_path: Path) -> None:
    source = tmp_path / "model"
    add(source, INDEX, 1.0)
    save_file({NAME: torch.full((96, 72), 7.0)}, source / other)
    assert torch.equal(of_transformers(source)[NAME], HFDirectory(source).read(NAME))


def edit_index(directory: Path, **entries: str | None) -> None:
    file = directory / INDEX
    index = json.loads(file.read_text())
    for name, shard in entries.items():
        index["weight_map"].pop(name, None)
        if shard is not None:
            index["weight_map"][name] = shard
    file.write_text(json.dumps(index))


@pytest.mark.parametrize("shard", [None, "part-0.safetensors", "part-1.safetensors"])
def test_an_index_that_does_not_list_or_misplaces_a_tensor_loses_nothing(
    shard: str | None, tmp_path: Path
) -> None:
    source = tmp_path / "model"
    add(source, INDEX, 1.0)
    edit_index(source, **{NAME: shard})
    expected, found = of_transformers(source), HFDirectory(source)
    assert found.names == expected.keys()
    assert torch.equal(found.read(NAME), expected[NAME])


def test_an_index_that_contradicts_its_files_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    add(source, INDEX, 1.0)
    edit_index(source, ghost="part-0.safetensors")
    with pytest.raises(ValueError, match="names ghost, which none of its files holds"):
        HFDirectory(source)
    edit_index(source, ghost="part-7.safetensors")
    with pytest.raises(ValueError, match=r"names \['part-7\.safetensors'\], which .* does not hold"):
        HFDirectory(source)
    edit_index(source, ghost=None)
    both = {file: load_file(source / file) for file in ("part-0.safetensors", "part-1.safetensors")}
    lacking = next(file for file, held in both.items() if NAME not in held)
    save_file({**both[lacking], NAME: torch.zeros(96, 72)}, source / lacking)
    with pytest.raises(
        ValueError, match=rf"{NAME} is in part-0.* and in part-1.*; accepted: every tensor once"
    ):
        HFDirectory(source)
    (source / INDEX).write_text('{"weight_map": 3}')
    with pytest.raises(ValueError, match="is no index of weights"):
        HFDirectory(source)


def test_an_adapter_beside_the_weights_is_refused(tmp_path: Path) -> None:
    source = tmp_path / "model"
    add(source, SINGLE, 1.0)
    (source / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    with pytest.raises(
        ValueError, match=r"has an adapter_config\.json, which is not read; accepted: .* merged"
    ):
        HFDirectory(source)
