"""The memory prediction: parameter counts against transformers' models, the rest against arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM, PreTrainedConfig

from gapo_mega.config import Config
from gapo_mega.engine.megatron.build import VOCABULARY_DIVISOR as ENGINE_DIVISOR
from gapo_mega.memory_plan import VOCABULARY_DIVISOR, critic_parameters, predict, stage_parameters
from gapo_mega.models import ModelShape, shape_of

SIZES = {
    "num_hidden_layers": 6,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "vocab_size": 256,
}
MISTRAL_7B = MistralConfig(vocab_size=32000)  # transformers' defaults are Mistral 7B


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m", "dtype": "bf16"},
        "data": {"source": "s", "max_prompt_tokens": 100},
        "rollout": {"max_new_tokens": 28},
        "objectives": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    }
    return Config.model_validate(base | sections)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "build"), [(LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)]
)
def test_count_of_a_real_model(kind: type[PreTrainedConfig], build: Any, tied: bool) -> None:
    hf_config = kind(**SIZES, tie_word_embeddings=tied)
    expected = sum(p.numel() for p in build(hf_config).parameters())
    shape = shape_of(hf_config)
    assert stage_parameters(shape, 1, 1, 0) == expected
    # Without tying, stages add up to the model; with it, the last stage has a copy of the embedding.
    copy = 256 * 48 if tied else 0
    for pipeline in (2, 3):
        assert sum(stage_parameters(shape, 1, pipeline, s) for s in range(pipeline)) == expected + copy
    # Tensor ranks share everything but the 2 norms of each of 6 layers and the final one. One rank more also
    # pads the vocabulary to a multiple of 2 x 128, which 256 already is.
    assert 2 * stage_parameters(shape, 2, 1, 0) == expected + 13 * 48


def test_padding_of_the_vocabulary() -> None:
    shape = shape_of(LlamaConfig(**(SIZES | {"vocab_size": 257}), tie_word_embeddings=True))
    whole = shape_of(LlamaConfig(**(SIZES | {"vocab_size": 384}), tie_word_embeddings=True))
    assert stage_parameters(shape, 1, 1, 0) == stage_parameters(whole, 1, 1, 0)
    assert VOCABULARY_DIVISOR == ENGINE_DIVISOR


def test_critic_has_heads_for_the_output_layer() -> None:
    shape = shape_of(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert critic_parameters(shape, 1, 1, 0, 3) == stage_parameters(shape, 1, 1, 0) - 256 * 48 + 3 * 49
    assert critic_parameters(shape, 1, 2, 0, 3) == stage_parameters(shape, 1, 2, 0)


def test_mistral_7b_on_eight_ranks() -> None:
    shape: ModelShape = shape_of(MISTRAL_7B)
    count = stage_parameters(shape, 4, 1, 0)
    # 7.24e9 parameters, as published. 4 tensor ranks hold the norms (266240) each, and pad the 32000 rows of
    # the embedding and of the output layer to a multiple of 4 x 128: 256 rows more.
    assert stage_parameters(shape, 1, 1, 0) == 7_241_732_096
    assert 4 * count == 7_241_732_096 + 3 * 266_240 + 2 * 256 * 4096
    (stage,) = predict(config(parallel={"tensor": 4}), shape, 8).stages
    assert stage.parameters == stage.reference == 2 * count
    assert stage.gradients == 4 * count
    assert stage.optimizer == 12 * count // 2  # fp32 main parameters and two moments, over 2 data ranks
    assert stage.objective_rows == 2 * 4 * (count // 2)  # all objectives but the one in the gradient buffer
    assert stage.critic == 0
    # keys and values x layers x sequences x tokens x (2 of 8 groups of 128) x 2 bytes
    assert stage.kv_cache == 2 * 32 * 16 * 128 * 2 * 128 * 2
    assert stage.peak == stage.resident + max(stage.activations, stage.kv_cache)


def test_optimizer_kinds() -> None:
    shape = shape_of(LlamaConfig(**SIZES))
    count = stage_parameters(shape, 1, 1, 0)

    def optimizer_bytes(dtype: str, **settings: Any) -> int:
        (stage,) = predict(config(model={"path": "m", "dtype": dtype}, optimizer=settings), shape, 2).stages
        return stage.optimizer

    assert optimizer_bytes("fp32", distributed=False) == 8 * count
    assert optimizer_bytes("fp32", distributed=True) == 4 * count
    assert optimizer_bytes("fp32", name="sgd", distributed=False) == 0
    assert optimizer_bytes("bf16", name="sgd", momentum=0.9, distributed=False) == 8 * count


def test_critic_models() -> None:
    shape = shape_of(LlamaConfig(**SIZES))
    shared, separate = (
        predict(config(advantages={"name": "gae"}, critic={"heads": heads}), shape, 1).stages[0].critic
        for heads in ("shared", "separate")
    )
    # bf16 parameters, fp32 gradient, fp32 main parameters and moments: 18 bytes each
    assert shared == 18 * critic_parameters(shape, 1, 1, 0, 3)
    assert separate == 3 * 18 * critic_parameters(shape, 1, 1, 0, 1)


def test_recomputation_saves_and_the_table_shows_every_stage() -> None:
    shape = shape_of(MISTRAL_7B)
    plans = {
        kind: predict(
            config(model={"path": "m", "dtype": "bf16", "recompute": kind}, parallel={"pipeline": 2}),
            shape,
            2,
        )
        for kind in ("none", "selective", "full")
    }
    none, selective, full = (plans[kind].stages[0].activations for kind in ("none", "selective", "full"))
    assert none > selective > full > 0
    first, last = plans["none"].stages
    assert last.parameters > first.parameters  # the final norm
    table = plans["none"].table().splitlines()
    assert table[0].split() == ["GiB", "per", "rank", "stage", "0", "stage", "1"]
    assert float(table[1].split()[1]) == pytest.approx(
        first.parameters / 2**30, abs=5e-3
    )  # printed to 2 digits
    assert plans["none"].peak == max(first.peak, last.peak)
