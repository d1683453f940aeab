"""Directories that PEFT writes, and what is wrong with others."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from gapo_mega.config.lora import LoraConfig
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.adapters import AdapterNames
from gapo_mega.models.huggingface.peft_adapter import PeftAdapter, write_adapter
from tests.helpers import peft_models
from tests.helpers.tiny import tiny_llama

LORA = LoraConfig.model_validate(peft_models.SETTINGS)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("peft")
    tiny_llama(folder / "model")
    peft_models.random_adapter(folder / "model", folder / "adapter")
    return folder


def expected(folder: Path, lora: LoraConfig = LORA) -> dict[str, tuple[int, int]]:
    names = AdapterNames(shape_of(HFDirectory(folder / "model").config), lora)
    return {names.source(name): names.size(name) for name in names.names()}


def copied(folder: Path, tmp_path: Path) -> Path:
    target = tmp_path / "adapter"
    target.mkdir()
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        (target / file).write_bytes((folder / "adapter" / file).read_bytes())
    return target


def test_reads_what_peft_writes_and_writes_what_it_reads(folder: Path, tmp_path: Path) -> None:
    adapter = PeftAdapter(folder / "adapter", LORA)
    adapter.check(expected(folder))
    tensors = {name: adapter.read(name) for name in expected(folder)}
    write_adapter(tmp_path / "again", LORA, str(folder / "model"), tensors)
    before = peft_models.flat_adapter(folder / "model", folder / "adapter")
    after = peft_models.flat_adapter(folder / "model", tmp_path / "again")
    assert torch.equal(before, after)
    tokens_BT = torch.arange(3, 23).view(2, 10)
    logits = [peft_models.logits_of(folder / "model", path, tokens_BT) for path in
              (folder / "adapter", tmp_path / "again")]  # fmt: skip
    assert torch.equal(*logits)  # rank and alpha as well


FIELDS: list[tuple[dict[str, Any], str]] = [
    ({"peft_type": "IA3"}, r"found peft_type 'IA3', accepted: \"LORA\""),
    ({"use_dora": True}, "found use_dora True, accepted: false"),
    ({"bias": "all"}, "found bias 'all', accepted: \"none\""),
    ({"modules_to_save": ["lm_head"]}, r"found modules_to_save \['lm_head'\], accepted: null"),
    ({"rank_pattern": {"q_proj": 4}}, "found rank_pattern"),
    ({"layers_to_transform": [1]}, "found layers_to_transform"),
    ({"r": 4}, "model.lora.rank: found 3 with an adapter of 4"),
    ({"r": None}, "model.lora.rank: found 3 with an adapter of None"),
    ({"lora_alpha": 16}, "model.lora.alpha: found 5.0 with an adapter of 16"),
    ({"use_rslora": True}, "model.lora.rank_stabilized: found False with an adapter of True"),
    ({"target_modules": "q_proj|v_proj"}, "found target_modules 'q_proj|v_proj', accepted: a list"),
    ({"target_modules": ["q_proj"]}, "model.lora.target_modules: found .* with an adapter of q_proj"),
]


@pytest.mark.parametrize(("fields", "message"), FIELDS)
def test_another_adapter_is_refused(
    folder: Path, tmp_path: Path, fields: dict[str, Any], message: str
) -> None:
    target = copied(folder, tmp_path)
    file = target / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **fields}))
    with pytest.raises(ValueError, match=message.replace("|", r"\|")) as caught:
        PeftAdapter(target, LORA)
    assert "\n" not in str(caught.value) and str(caught.value).startswith("model.lora.")


def without_one(tensors: dict[str, Any]) -> None:
    tensors.popitem()


def with_another(tensors: dict[str, Any]) -> None:
    tensors["base_model.model.lm_head.lora_A.weight"] = torch.zeros(3, 72)


def of_other_shape(tensors: dict[str, Any]) -> None:
    name = next(name for name in tensors if name.endswith("q_proj.lora_A.weight"))
    tensors[name] = torch.zeros(3, 71)


@pytest.mark.parametrize(
    ("change", "message"),
    [(without_one, "lacks base_model"), (with_another, "has, beside"), (of_other_shape, r"shape \[3, 71\]")],
)
def test_other_tensors_are_refused(
    folder: Path, tmp_path: Path, change: Callable[[dict[str, Any]], None], message: str
) -> None:
    target = copied(folder, tmp_path)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file)
    with pytest.raises(ValueError, match=message) as caught:
        PeftAdapter(target, LORA).check(expected(folder))
    assert "\n" not in str(caught.value)


def test_numbers_that_are_not_finite_are_refused(folder: Path, tmp_path: Path) -> None:
    target = copied(folder, tmp_path)
    file = target / "adapter_model.safetensors"
    tensors = load_file(file)
    name = sorted(tensors)[0]
    tensors[name][0, 0] = float("nan")
    save_file(tensors, file)
    with pytest.raises(ValueError, match=f"{name} holds NaN or infinite numbers"):
        PeftAdapter(target, LORA).read(name)


@pytest.mark.parametrize(
    ("break_it", "message"),
    [
        (lambda d: (d / "adapter_config.json").unlink(), "has no adapter_config.json"),
        (lambda d: (d / "adapter_model.safetensors").unlink(), "has no adapter_model.safetensors"),
        (lambda d: (d / "adapter_config.json").write_text("{"), "cannot be read"),
        (lambda d: (d / "adapter_config.json").write_text("[]"), "found list, accepted: an object"),
        (lambda d: (d / "adapter_config.json").write_bytes(b"\xff\xfe"), "cannot be read"),
        (lambda d: (d / "adapter_model.safetensors").write_bytes(b"x"), "cannot be read"),
    ],
)
def test_broken_directories_are_refused(
    folder: Path, tmp_path: Path, break_it: Callable[[Path], object], message: str
) -> None:
    target = copied(folder, tmp_path)
    break_it(target)
    with pytest.raises(ValueError, match=message) as caught:
        PeftAdapter(target, LORA).check(expected(folder))
    assert "\n" not in str(caught.value)
