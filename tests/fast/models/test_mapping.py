"""Hugging Face <-> Megatron weights, without Megatron: every layout gives the same bits back."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import (
    AutoConfig,
    GPT2Config,
    LlamaConfig,
    MistralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen3Config,
)

from gapo_mega.models import HFDirectory, ModelShape, families, family_of, shape_of
from gapo_mega.models.mapping import local_spec_name
from tests.helpers.tiny import (
    LLAMA3_ROPE,
    tiny_llama,
    tiny_llama3,
    tiny_mistral,
    tiny_mixtral,
    tiny_qwen2,
    tiny_qwen3,
    tiny_qwen3_moe,
)

LAYER_PARAMETERS = (
    "input_layernorm.weight",
    "self_attention.linear_qkv.weight",
    "self_attention.linear_proj.weight",
    "pre_mlp_layernorm.weight",
)
MLP = ("linear_fc1.weight", "linear_fc2.weight")
BIAS = ("self_attention.linear_qkv.bias",)
QK_NORMS = ("self_attention.q_layernorm.weight", "self_attention.k_layernorm.weight")
OLD_LLAMA3_ROPE = {key: value for key, value in LLAMA3_ROPE.items() if key != "rope_theta"}


def stage_parameters(layers: range, first: bool, last: bool, shape: ModelShape) -> list[str]:
    of_layer = [*LAYER_PARAMETERS, *(BIAS if shape.qkv_bias else ()), *(QK_NORMS if shape.qk_norm else ())]
    if shape.experts is None:
        of_layer += [f"mlp.{name}" for name in MLP]
    else:
        experts = range(shape.experts.count)
        of_layer.append("mlp.router.weight")
        of_layer += [f"mlp.experts.local_experts.{expert}.{name}" for expert in experts for name in MLP]
    names = [f"decoder.layers.{layer}.{name}" for layer in layers for name in of_layer]
    if first:
        names.append("embedding.word_embeddings.weight")
    if last:
        names.append("decoder.final_layernorm.weight")
        if not (shape.tied and first):
            names.append("output_layer.weight")
    return names


def round_trip(
    directory: Path,
    tensor: int,
    pipeline: int,
    change: Callable[[str, Tensor], Tensor] | None = None,
    expert_tensor: int | None = None,
) -> dict[str, Tensor]:
    """Through the parameters of every rank of a layout; ``change`` alters them on the way."""
    source = HFDirectory(directory)
    shape = shape_of(source.config)
    family, padded_vocab = family_of(source.config), shape.padded_vocab(8 * tensor)
    weights = family.weight_map(shape, tensor, padded_vocab, expert_tensor)
    per_stage = shape.num_layers // pipeline
    back: dict[str, Tensor] = {}
    for stage in range(pipeline):
        layers = range(stage * per_stage, (stage + 1) * per_stage)
        for name in stage_parameters(layers, stage == 0, stage == pipeline - 1, shape):
            ranks = (expert_tensor or tensor) if ".local_experts." in name else tensor
            parts = [weights.to_megatron(name, source.read, rank) for rank in range(ranks)]
            assert len({part.shape for part in parts}) == 1
            if change is not None:
                parts = [change(name, part) for part in parts]
            if not weights.is_copy(name):
                back.update(weights.to_hf(name, parts))
    assert back.keys() == weights.hf_names() == source.names
    return back


def llama(directory: Path, *, tied: bool) -> Path:
    """12 heads in 6 groups (head_dim is not hidden / heads), a vocabulary that nothing divides."""
    tiny_llama(directory, tied=tied, heads=12, groups=6, vocab=101)
    return directory


def assert_bit_equal(tensors: dict[str, Tensor], directory: Path) -> None:
    for name, expected in load_file(directory / "model.safetensors").items():
        assert torch.equal(tensors[name], expected), name


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(("tensor", "pipeline"), [(1, 1), (2, 1), (3, 1), (6, 1), (1, 2), (2, 2), (3, 4)])
def test_llama_round_trip_is_bit_equal(tmp_path: Path, tied: bool, tensor: int, pipeline: int) -> None:
    directory = llama(tmp_path, tied=tied)
    assert_bit_equal(round_trip(directory, tensor, pipeline), directory)


@pytest.mark.parametrize(
    "write", [tiny_llama3, tiny_mistral, tiny_qwen2, tiny_qwen3, tiny_mixtral, tiny_qwen3_moe]
)
def test_every_family_round_trip_is_bit_equal(
    tmp_path: Path, write: Callable[[Path], PreTrainedModel]
) -> None:
    write(tmp_path)
    for tensor, pipeline in [(1, 1), (2, 1), (1, 2), (2, 2)]:
        assert_bit_equal(round_trip(tmp_path, tensor, pipeline), tmp_path)


@pytest.mark.parametrize("write", [tiny_mixtral, tiny_qwen3_moe])
@pytest.mark.parametrize(("tensor", "expert_tensor"), [(1, 2), (2, 1), (2, 4)])
def test_experts_split_otherwise_than_attention(
    tmp_path: Path, write: Callable[[Path], PreTrainedModel], tensor: int, expert_tensor: int
) -> None:
    write(tmp_path)
    assert_bit_equal(round_trip(tmp_path, tensor, 2, expert_tensor=expert_tensor), tmp_path)


def test_the_two_families_name_gate_and_up_projection_alike(tmp_path: Path) -> None:
    """Mixtral's w1 is the gate, w3 the way up and w2 the way down: transformers' class says so itself."""
    model = tiny_mixtral(tmp_path)
    source = HFDirectory(tmp_path)
    weights = family_of(source.config).weight_map(shape_of(source.config))
    experts = "decoder.layers.1.mlp.experts.local_experts.3."
    in_memory = model.model.layers[1].mlp.experts
    gated = weights.to_megatron(experts + "linear_fc1.weight", source.read, 0)
    assert torch.equal(gated, in_memory.gate_up_proj[3])
    down = weights.to_megatron(experts + "linear_fc2.weight", source.read, 0)
    assert torch.equal(down, in_memory.down_proj[3])


def test_a_row_changed_by_one_percent_shows(tmp_path: Path) -> None:
    def change(name: str, part: Tensor) -> Tensor:
        changed = part.clone()
        if name == "decoder.layers.2.self_attention.linear_qkv.weight":
            changed[5] *= 1.01
        return changed

    back = round_trip(llama(tmp_path, tied=True), 2, 1, change)
    originals = load_file(tmp_path / "model.safetensors")
    different = {name for name, tensor in originals.items() if not torch.equal(back[name], tensor)}
    assert different == {"model.layers.2.self_attn.q_proj.weight"}


def test_padding_rows_are_zero_and_do_not_come_back(tmp_path: Path) -> None:
    source = HFDirectory(llama(tmp_path, tied=True))
    shape = shape_of(source.config)
    weights = family_of(source.config).weight_map(shape, tensor=2, padded_vocab=128)
    parts = [weights.to_megatron("embedding.word_embeddings.weight", source.read, rank) for rank in range(2)]
    assert [part.shape[0] for part in parts] == [64, 64]
    assert not parts[1][shape.vocab - 64 :].any()
    (whole,) = weights.to_hf("embedding.word_embeddings.weight", parts).values()
    assert whole.shape[0] == shape.vocab


def test_transformer_engine_names_mean_the_same_tensors() -> None:
    fused = {
        "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
        "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
        "mlp.linear_fc1.weight": "mlp.linear_fc1.weight",
    }
    weights = families()["llama"].weight_map(shape_of(LlamaConfig()))
    for fused_name, plain_name in fused.items():
        name, plain = f"decoder.layers.3.{fused_name}", f"decoder.layers.3.{plain_name}"
        assert local_spec_name(name) == plain
        assert weights.sources(name) == weights.sources(plain)


def test_qkv_bias_is_interleaved_like_the_weight() -> None:
    config = Qwen2Config(
        hidden_size=32, intermediate_size=64, num_attention_heads=4, num_key_value_heads=2, vocab_size=64
    )
    weights = families()["qwen2"].weight_map(shape_of(config), tensor=2)
    tensors = {"q": torch.arange(32.0), "k": 100 + torch.arange(16.0), "v": 200 + torch.arange(16.0)}
    name = "decoder.layers.0.self_attention.linear_qkv.bias"
    parts = [weights.to_megatron(name, lambda hf: tensors[hf.split(".")[-2][0]], rank) for rank in range(2)]
    expected = torch.cat([tensors["q"][16:], tensors["k"][8:], tensors["v"][8:]])
    assert torch.equal(parts[1], expected)
    back = weights.to_hf(name, parts)
    assert torch.equal(back["model.layers.0.self_attn.k_proj.bias"], tensors["k"])


def test_facts_of_mistral_7b() -> None:
    config = MistralConfig(  # config.json of Mistral-7B-v0.1
        vocab_size=32000,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=32768,
        rms_norm_eps=1e-5,
        sliding_window=4096,
        rope_theta=10000.0,
    )
    shape = shape_of(config)
    assert (shape.family, shape.head_dim, shape.kv_groups, shape.sliding_window) == ("mistral", 128, 8, 4096)
    assert (shape.rope_theta, shape.tied, shape.qkv_bias) == (10000.0, False, False)


def test_facts_of_qwen() -> None:
    shape = shape_of(  # config.json of Qwen2.5-0.5B-Instruct, as transformers 4 wrote it
        Qwen2Config.from_dict(
            {
                "architectures": ["Qwen2ForCausalLM"],
                "model_type": "qwen2",
                "hidden_act": "silu",
                "hidden_size": 896,
                "intermediate_size": 4864,
                "max_position_embeddings": 32768,
                "max_window_layers": 21,
                "num_attention_heads": 14,
                "num_hidden_layers": 24,
                "num_key_value_heads": 2,
                "rms_norm_eps": 1e-06,
                "rope_theta": 1000000.0,
                "sliding_window": 32768,
                "tie_word_embeddings": True,
                "use_sliding_window": False,
                "vocab_size": 151936,
            }
        )
    )
    assert (shape.head_dim, shape.kv_groups, shape.qkv_bias, shape.qk_norm) == (64, 2, True, False)
    assert (shape.rope_theta, shape.sliding_window, shape.tied) == (1e6, None, True)
    shape = shape_of(Qwen3Config(hidden_size=1024, num_attention_heads=16, num_key_value_heads=8))
    assert (shape.head_dim, shape.qkv_bias, shape.qk_norm) == (128, False, True)


@pytest.mark.parametrize(
    ("fields", "rope"),
    [
        ({"rope_theta": 5e5, "rope_scaling": OLD_LLAMA3_ROPE}, (5e5, 8.0)),  # transformers 4
        ({"rope_parameters": {**LLAMA3_ROPE, "factor": 32}}, (5e5, 32.0)),  # Llama 3.2
        ({"rope_theta": 5e5, "rope_scaling": None}, (5e5, None)),  # Llama 3
        ({}, (1e4, None)),  # Llama 1, before there was such a field
    ],
)
def test_rotary_fields_old_and_new(fields: dict[str, object], rope: tuple[float, float | None]) -> None:
    shape = shape_of(AutoConfig.for_model("llama").from_dict({"model_type": "llama", **fields}))
    assert (shape.rope_theta, shape.rope_scaling_factor) == rope


def test_a_head_width_of_its_own_is_read_where_the_class_has_no_such_field() -> None:
    assert shape_of(Qwen2Config(head_dim=96, hidden_size=256, num_attention_heads=4)).head_dim == 96


@pytest.mark.parametrize(
    ("kind", "changes", "message"),
    [
        (LlamaConfig, {"hidden_act": "gelu"}, r"hidden_act: found 'gelu', accepted: 'silu'"),
        (LlamaConfig, {"attention_bias": True}, r"attention_bias: found True, accepted: False"),
        (LlamaConfig, {"mlp_bias": True}, r"mlp_bias: found True"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "linear", "factor": 4.0, "rope_theta": 1e4}},
            r"rope_type: found 'linear', accepted: 'default', 'llama3'",
        ),
        (LlamaConfig, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}, r"rope_type: found 'dynamic'"),
        (
            LlamaConfig,
            {"rope_parameters": {"rope_type": "default", "partial_rotary_factor": 0.5, "rope_theta": 1e4}},
            r"partial_rotary_factor: found 0.5",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {**LLAMA3_ROPE, "low_freq_factor": 2.0}},
            r"rope_parameters.low_freq_factor: found 2.0, accepted: 1.0",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {**LLAMA3_ROPE, "high_freq_factor": 8.0}},
            r"rope_parameters.high_freq_factor: found 8.0, accepted: 4.0",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {**LLAMA3_ROPE, "original_max_position_embeddings": 4096}},
            r"rope_parameters.original_max_position_embeddings: found 4096, accepted: 8192",
        ),
        (
            LlamaConfig,
            {"rope_parameters": {**LLAMA3_ROPE, "factor": 0.0}},
            r"rope_parameters.factor: found 0.0, accepted: a number above 0",
        ),
        (
            Qwen3Config,
            {"rope_parameters": {"full_attention": {"rope_type": "default", "rope_theta": 1e4}}},
            r"rope_parameters.rope_theta: found None",
        ),
        (MistralConfig, {"hidden_act": "gelu_new"}, r"hidden_act: found 'gelu_new'"),
        (Qwen2Config, {"hidden_act": "relu"}, r"hidden_act: found 'relu'"),
        (Qwen2Config, {"use_sliding_window": True}, r"use_sliding_window: found True, accepted: False"),
        (
            Qwen2Config,
            {"num_hidden_layers": 2, "layer_types": ["full_attention", "sliding_attention"]},
            r"layer_types: found 'sliding_attention', accepted: 'full_attention'",
        ),
        (
            Qwen2Config,
            {"rope_theta": 1e6, "rope_scaling": {"type": "yarn", "factor": 4.0}},
            r"rope_type: found 'yarn'",
        ),
        (Qwen3Config, {"attention_bias": True}, r"attention_bias: found True, accepted: False"),
        (Qwen3Config, {"use_sliding_window": True}, r"use_sliding_window: found True"),
    ],
)
def test_what_megatron_would_compute_differently_is_refused(
    kind: type[PreTrainedConfig], changes: dict[str, object], message: str
) -> None:
    with pytest.raises(ValueError, match=f"config.json .*{message}"):
        shape_of(kind(**changes))


def test_unknown_family_names_the_known_ones() -> None:
    with pytest.raises(
        ValueError, match=r"model_type 'gpt2', accepted: llama, mistral, mixtral, qwen2, qwen3, qwen3_moe$"
    ):
        shape_of(GPT2Config())


def test_layouts_that_do_not_divide_are_refused(tmp_path: Path) -> None:
    shape = shape_of(LlamaConfig(num_key_value_heads=8))
    with pytest.raises(ValueError, match=r"parallel.tensor: found 3, .* kv_groups 8"):
        families()["llama"].weight_map(shape, tensor=3)


def test_tensors_of_another_shape_than_the_configuration_are_refused(tmp_path: Path) -> None:
    file = llama(tmp_path, tied=True) / "model.safetensors"
    tensors = load_file(file)
    tensors["model.layers.1.mlp.up_proj.weight"] = torch.zeros(80, 48)
    save_file(tensors, file, metadata={"format": "pt"})
    source = HFDirectory(file.parent)
    weights = family_of(source.config).weight_map(shape_of(source.config))
    with pytest.raises(
        ValueError, match=r"layers.1.mlp.up_proj.weight: found the shape \[80, 48\], .* \[96, "
    ):
        weights.to_megatron("decoder.layers.1.mlp.linear_fc1.weight", source.read, 0)
