"""Hugging Face <-> Megatron checkpoints: bit for bit, under Megatron's own keys, whole or not at all."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.dist_checkpointing.dict_utils import nested_values
from megatron.core.dist_checkpointing.mapping import ShardedObject, apply_factories
from megatron.core.dist_checkpointing.validation import StrictHandling
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaForSequenceClassification

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import convert, weights
from gapo_mega.engine.megatron.checkpoint.dist_format import METADATA, DistReader, read_common
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.score_head import score_head_of
from tests.helpers.hf_directories import assert_same_model, classifier, files_of, language_model
from tests.helpers.tiny import (
    safe_rlhf_model,
    tiny_llama,
    tiny_llama3,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen3,
    tiny_qwen3_moe,
)

FAMILIES = [tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_llama3, tiny_mixtral, tiny_qwen3_moe]


def there_and_back(source: Path, folder: Path, **layout: int) -> None:
    convert.to_checkpoint(source, folder / "ckpt", **layout)
    convert.to_hf(folder / "ckpt", folder / "back")
    assert_same_model(folder / "back", source)


@pytest.mark.parametrize("layout", [{}, {"tensor": 2}, {"tensor": 2, "pipeline": 2}])
@pytest.mark.parametrize("tied", [False, True])
def test_there_and_back_is_bit_equal(tmp_path: Path, layout: dict[str, int], tied: bool) -> None:
    there_and_back(language_model(tmp_path / "hf", tied=tied), tmp_path, **layout)


@pytest.mark.parametrize("make", FAMILIES)
def test_every_family_there_and_back(tmp_path: Path, make: Any) -> None:
    make(tmp_path / "hf", vocab=101)
    there_and_back(tmp_path / "hf", tmp_path, tensor=2, pipeline=2)


def test_a_stored_copy_of_a_tied_output_layer_is_left_out(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf", tied=True)
    tensors = load_file(source / "model.safetensors")
    changed(source, **{"lm_head.weight": tensors["model.embed_tokens.weight"].clone()})
    convert.to_checkpoint(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert load_file(tmp_path / "back" / "model.safetensors").keys() == tensors.keys()
    changed(source, **{"lm_head.weight": tensors["model.embed_tokens.weight"] * 2})
    with pytest.raises(ValueError, match=r"lm_head\.weight differs from model\.embed_tokens\.weight"):
        convert.to_checkpoint(source, tmp_path / "other")


def test_named_chat_templates_come_along(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    named = Path("additional_chat_templates") / "tool_use.jinja"
    (source / named).parent.mkdir()
    (source / named).write_text("{{ tools }}")
    convert.to_checkpoint(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert (tmp_path / "back" / named).read_bytes() == (source / named).read_bytes()


def test_types_are_kept_or_changed_on_demand(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    # As some directories are: norms in fp32, the rest in bf16.
    mixed = {name: value if "norm" in name else value.bfloat16() for name, value in tensors.items()}
    save_file(mixed, source / "model.safetensors", metadata={"format": "pt"})
    there_and_back(source, tmp_path)
    convert.to_checkpoint(source, tmp_path / "bf16", dtype=torch.bfloat16)
    convert.to_hf(tmp_path / "bf16", tmp_path / "rounded")
    rounded = load_file(tmp_path / "rounded" / "model.safetensors")
    assert all(torch.equal(rounded[name], value.bfloat16()) for name, value in tensors.items())
    assert '"dtype": "bfloat16"' in (tmp_path / "rounded" / "config.json").read_text()
    convert.to_hf(tmp_path / "bf16", tmp_path / "wide", dtype=torch.float32)
    wide = load_file(tmp_path / "wide" / "model.safetensors")
    assert all(torch.equal(wide[name], value.bfloat16().float()) for name, value in tensors.items())


@pytest.mark.parametrize("make", [classifier, safe_rlhf_model])
def test_score_models_there_and_back(tmp_path: Path, make: Any) -> None:
    there_and_back(make(tmp_path / "hf"), tmp_path)
    directory = HFDirectory(tmp_path / "hf")
    about = read_common(tmp_path / "ckpt")["about"]
    head = score_head_of(directory.config, directory.names)
    assert head is not None and about["score_head"]["weight"] == head.weight
    assert head.is_cost == (make is safe_rlhf_model)


def test_more_than_one_label_is_refused(tmp_path: Path) -> None:
    config = tiny_llama(tmp_path / "hf", vocab=101).config
    config.num_labels = 3
    LlamaForSequenceClassification(config).float().save_pretrained(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"num_labels: found 3, accepted: 1"):
        convert.to_checkpoint(tmp_path / "hf", tmp_path / "ckpt")


def with_experts(folder: Path) -> Path:
    tiny_mixtral(folder)
    return folder


def sharded(model: Any) -> dict[str, Any]:
    state: dict[str, Any] = model.sharded_state_dict(metadata=dict(METADATA))
    return state


@pytest.mark.usefixtures("one_process")
@pytest.mark.parametrize("make", [language_model, classifier, with_experts])
def test_the_keys_are_those_of_megatron(tmp_path: Path, make: Any) -> None:
    source = make(tmp_path / "hf")
    convert.to_checkpoint(source, tmp_path / "ckpt", tensor=2, pipeline=2)
    directory = HFDirectory(source)
    shape, head = shape_of(directory.config), score_head_of(directory.config, directory.names)
    settings = ModelConfig(path=str(source))
    heads = None if head is None else 1
    with megatron_device():
        expected = build.build_gpt(shape, settings, ParallelConfig(), heads)
        weights.load(expected, shape, source, head)
        model = build.build_gpt(shape, settings, ParallelConfig(), heads)
        state = sharded(model)
        # Megatron's own loader, told to refuse any key that is missing or too many.
        loaded = dist_checkpointing.load(state, str(tmp_path / "ckpt"), strict=StrictHandling.RAISE_ALL)
        assert loaded.pop("about")["weights"] == shape.family
        model.load_state_dict(loaded)
        entries = sharded(model)
        apply_factories(entries)
    reader = DistReader(tmp_path / "ckpt")
    padded = {"embedding.word_embeddings.weight"} | ({"output_layer.weight"} if head is None else set())
    for entry in nested_values(entries):
        if isinstance(entry, ShardedObject):
            assert entry.unique_key in reader.objects
        elif isinstance(entry, ShardedTensor) and entry.key not in padded:
            assert tuple(reader.tensors[entry.key].size) == tuple(entry.global_shape), entry.key
    for (name, found), (_, wanted) in zip(model.named_parameters(), expected.named_parameters(), strict=True):
        assert torch.equal(found, wanted), name


@pytest.mark.usefixtures("one_process")
def test_a_value_model_takes_the_backbone_of_a_checkpoint(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf", tied=True)
    convert.to_checkpoint(source, tmp_path / "ckpt")
    shape = shape_of(HFDirectory(source).config)
    models = []
    for path in (source, tmp_path / "ckpt"):
        with megatron_device():
            model = build.build_gpt(shape, ModelConfig(path=""), ParallelConfig(), 3)
            weights.load(model, shape, path)
        models.append(dict(model.named_parameters()))
    assert all(torch.equal(value, models[1][name]) for name, value in models[0].items())
    assert models[1]["output_layer.weight"].shape == (3, 72)


def test_pickled_weights_are_read_and_nothing_else_is_unpickled(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    tensors = load_file(source / "model.safetensors")
    pickled = shutil.copytree(source, tmp_path / "pickled")
    (pickled / "model.safetensors").unlink()
    torch.save(tensors, pickled / "pytorch_model.bin")
    convert.to_checkpoint(pickled, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    assert_same_model(tmp_path / "back", source)

    class Surprise:
        def __reduce__(self) -> tuple[Any, ...]:
            return (Path.touch, (tmp_path / "executed",))

    torch.save({"model.norm.weight": Surprise()}, pickled / "pytorch_model.bin")
    with pytest.raises(ValueError, match=r"pytorch_model\.bin holds more than tensors"):
        HFDirectory(pickled)
    assert not (tmp_path / "executed").exists()


def changed(source: Path, **tensors: Tensor | None) -> None:
    content = load_file(source / "model.safetensors")
    for name, value in tensors.items():
        if value is None:
            content.pop(name)
        else:
            content[name] = value
    save_file(content, source / "model.safetensors", metadata={"format": "pt"})


def test_directories_that_do_not_fit_are_refused(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    with pytest.raises(ValueError, match=r"--pp: found 3, accepted: a divisor of the model's 4 layers"):
        convert.to_checkpoint(source, tmp_path / "ckpt", pipeline=3)
    with pytest.raises(ValueError, match=r"parallel\.tensor: found 3"):
        convert.to_checkpoint(source, tmp_path / "ckpt", tensor=3)
    changed(source, **{"model.layers.1.mlp.extra.weight": torch.zeros(2)})
    with pytest.raises(ValueError, match=r"does not have: model\.layers\.1\.mlp\.extra\.weight"):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    changed(source, **{"model.layers.1.mlp.extra.weight": None, "lm_head.weight": None})
    with pytest.raises(ValueError, match=r"tensors missing: lm_head\.weight"):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    with pytest.raises(ValueError, match=r"no metadata\.json of Megatron's torch_dist format"):
        convert.to_hf(source, tmp_path / "back")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]


def test_a_conversion_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source = language_model(tmp_path / "hf")
    read = HFDirectory.read

    def failing(self: HFDirectory, name: str) -> Tensor:
        if name.startswith("model.layers.2."):
            raise OSError(28, "No space left on device")
        return read(self, name)

    with monkeypatch.context() as patch:
        patch.setattr(HFDirectory, "read", failing)
        with pytest.raises(ValueError, match=r"ckpt .*No space left on device"):
            convert.to_checkpoint(source, tmp_path / "ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(HFDirectory, "read", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises((KeyboardInterrupt, ValueError)):
            convert.to_checkpoint(source, tmp_path / "ckpt")
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(10, 9, 1))  # type: ignore[attr-defined]
        with pytest.raises(ValueError, match=r"ckpt: 0\.00 GB are needed"):
            convert.to_checkpoint(source, tmp_path / "ckpt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hf"]
    (tmp_path / "a file").touch()
    with pytest.raises(ValueError, match=r"cannot be written: .*a file"):
        convert.to_checkpoint(source, tmp_path / "a file" / "ckpt")


def test_an_existing_target_is_replaced_only_on_demand(tmp_path: Path) -> None:
    source = language_model(tmp_path / "hf")
    convert.to_checkpoint(source, tmp_path / "ckpt")
    with pytest.raises(ValueError, match="exists already"):
        convert.to_checkpoint(source, tmp_path / "ckpt")
    convert.to_checkpoint(source, tmp_path / "ckpt", overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["ckpt", "hf"]
    (tmp_path / "ckpt" / "metadata.json").unlink()  # what makes it a checkpoint, and is written last
    with pytest.raises(ValueError, match=r"no metadata\.json"):
        convert.to_hf(tmp_path / "ckpt", tmp_path / "back")


def test_what_is_replaced_stays_until_the_new_one_is_there(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    source = language_model(tmp_path / "hf")
    convert.to_checkpoint(source, tmp_path / "ckpt")
    convert.to_hf(tmp_path / "ckpt", tmp_path / "back")
    before = files_of(tmp_path / "back")
    rename = Path.rename

    def refusing(self: Path, target: Path) -> Path:
        if ".partial-" in self.name:
            raise OSError(13, "no renaming here")
        return rename(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", refusing)
        with pytest.raises(ValueError, match=r"back was not written: .*no renaming here"):
            convert.to_hf(tmp_path / "ckpt", tmp_path / "back", overwrite=True)
    assert files_of(tmp_path / "back") == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["back", "ckpt", "hf"]
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "rmtree", lambda _: (_ for _ in ()).throw(OSError(16, "busy")))
        convert.to_hf(tmp_path / "ckpt", tmp_path / "back", overwrite=True)
    assert "could not be removed" in caplog.text
    assert_same_model(tmp_path / "back", source)


def test_a_score_model_is_no_policy(tmp_path: Path, one_process: None) -> None:
    """With tied embeddings a policy asks for nothing that a score model lacks."""
    source = language_model(tmp_path / "hf", tied=True)
    config = LlamaForSequenceClassification.config_class.from_pretrained(source, num_labels=1)
    LlamaForSequenceClassification(config).float().save_pretrained(tmp_path / "classifier")
    convert.to_checkpoint(tmp_path / "classifier", tmp_path / "ckpt")
    shape = shape_of(HFDirectory(source).config)
    with megatron_device():
        model = build.build_gpt(shape, ModelConfig(path=str(source)), ParallelConfig())
        with pytest.raises(ValueError, match=r"found a score model, accepted: a language model"):
            weights.load(model, shape, tmp_path / "ckpt")
