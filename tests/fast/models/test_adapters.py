"""Where adapters lie in Megatron's layers: against the conversion of the weights that they change."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor

from gapo_mega.config.lora import LoraConfig
from gapo_mega.models import WeightMap
from gapo_mega.models.adapters import LINEARS, AdapterNames, change, layer_parameters, merged, sizes
from gapo_mega.models.family import LLAMA_TABLE
from gapo_mega.models.shape import ModelShape

SHAPE = ModelShape(
    family="llama",
    num_layers=2,
    hidden=12,
    ffn=20,
    heads=4,
    kv_groups=2,
    head_dim=6,
    vocab=30,
    tied=True,
    rope_theta=1e4,
    norm_eps=1e-5,
    qkv_bias=False,
    max_positions=64,
)
LORA = LoraConfig(rank=3, alpha=6.0)


def random_adapter(lora: LoraConfig = LORA) -> dict[str, Tensor]:
    """Whole parameters by their names in a Megatron model."""
    names = AdapterNames(SHAPE, lora)
    generator = torch.Generator().manual_seed(3)
    return {name: torch.randn(names.size(name), generator=generator) for name in names.names()}


def hf_changes(adapter: dict[str, Tensor], lora: LoraConfig) -> dict[str, Tensor]:
    """``scale B A`` of every Hugging Face weight, 0 without an adapter."""
    changes = {}
    for layer in range(SHAPE.num_layers):
        for linear in LINEARS:
            for module in linear.modules:
                inputs, outputs = sizes(SHAPE, module)
                value = torch.zeros(outputs, inputs)
                if module in lora.targets:
                    place = f"decoder.layers.{layer}.adapters.{module}"
                    value = lora.scale * adapter[f"{place}.lora_B"] @ adapter[f"{place}.lora_A"]
                changes[f"model.layers.{layer}.{linear.folder}.{module}.weight"] = value
    return changes


@pytest.mark.parametrize("targets", ["all-linear", ["k_proj", "up_proj", "o_proj"], ["q_proj"]])
@pytest.mark.parametrize("tensor", [1, 2])
def test_a_ranks_change_is_its_part_of_the_converted_one(targets: str | list[str], tensor: int) -> None:
    lora = LoraConfig.model_validate({"rank": 3, "alpha": 6.0, "target_modules": targets})
    adapter = random_adapter(lora)
    wanted = hf_changes(adapter, lora)
    weights, names = WeightMap(SHAPE, LLAMA_TABLE, tensor), AdapterNames(SHAPE, lora, tensor)
    for linear in LINEARS:
        if not set(linear.modules) & set(lora.targets):
            continue
        for rank in range(tensor):

            def part(name: str, rank: int = rank) -> Tensor:
                return names.part_of(name, adapter[name], rank)

            pairs = [
                (part(f"decoder.layers.1.adapters.{m}.lora_A"), part(f"decoder.layers.1.adapters.{m}.lora_B"))
                if m in lora.targets
                else sizes(SHAPE, m)[1] // tensor
                for m in linear.modules
            ]
            found = change(pairs, lora.scale, SHAPE.kv_groups // tensor if linear.by_group else 1)
            name = f"decoder.layers.1.{linear.path}.weight"
            expected = weights.to_megatron(name, wanted.__getitem__, rank)
            assert torch.allclose(found, expected, rtol=1e-5, atol=1e-5), (name, rank)


def test_merged_changes_adapted_weights_alone() -> None:
    adapter = random_adapter()
    weights, wanted = WeightMap(SHAPE, LLAMA_TABLE), hf_changes(adapter, LORA)
    name = "decoder.layers.0.self_attention.linear_qkv.weight"
    before = torch.randn(48, 12)
    found = merged(name, before, SHAPE, LORA, adapter.__getitem__)
    assert torch.allclose(found - before, weights.to_megatron(name, wanted.__getitem__, 0), atol=1e-5)
    for other in ("decoder.layers.0.input_layernorm.weight", "embedding.word_embeddings.weight"):
        assert merged(other, before, SHAPE, LORA, adapter.__getitem__) is before
    some = LORA.model_copy(update={"target_modules": ["o_proj"]})
    assert merged(name, before, SHAPE, some, adapter.__getitem__) is before


@pytest.mark.parametrize("tensor", [1, 2])
def test_parts_put_together_are_the_whole_under_pefts_names(tensor: int) -> None:
    names, adapter = AdapterNames(SHAPE, LORA, tensor), random_adapter()
    count = 0
    for name, whole in adapter.items():
        parts = [names.part_of(name, whole, rank) for rank in range(tensor)]
        ((source, found),) = names.to_hf(name, parts).items()
        assert torch.equal(found, whole)
        assert source.startswith("base_model.model.model.layers.") and source.endswith(".weight")
        count += parts[0].numel()
    assert count == layer_parameters(SHAPE, LORA, tensor) * SHAPE.num_layers
    assert names.has("decoder.layers.1.adapters.q_proj.lora_A")
    assert not names.has("decoder.layers.1.self_attention.linear_qkv.weight")


def test_biases_and_head_norms_are_nobodys_targets() -> None:
    shape = replace(SHAPE, qkv_bias=True, qk_norm=True)
    assert layer_parameters(shape, LORA) == layer_parameters(SHAPE, LORA)
