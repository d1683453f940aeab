"""What a model family provides, and what most of them share."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from transformers import PreTrainedConfig

from gapo_mega.models.mapping import EMBEDDING, OUTPUT_LAYER, Rule, Table, WeightMap
from gapo_mega.models.shape import ModelShape

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

# Tensor names of Llama, which most later families took over. Rows of parameters that a model does
# not have (biases) do no harm.
LLAMA_TABLE: Table = {
    EMBEDDING: Rule("vocab", ("model.embed_tokens.weight",)),
    _MEGATRON + "input_layernorm.weight": Rule("replicated", (_HF + "input_layernorm.weight",)),
    _MEGATRON + "self_attention.linear_qkv.weight": Rule(
        "qkv", tuple(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv")
    ),
    _MEGATRON + "self_attention.linear_qkv.bias": Rule(
        "qkv", tuple(f"{_HF}self_attn.{x}_proj.bias" for x in "qkv")
    ),
    _MEGATRON + "self_attention.linear_proj.weight": Rule("columns", (_HF + "self_attn.o_proj.weight",)),
    _MEGATRON + "pre_mlp_layernorm.weight": Rule("replicated", (_HF + "post_attention_layernorm.weight",)),
    _MEGATRON + "mlp.linear_fc1.weight": Rule(
        "gated", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight")
    ),
    _MEGATRON + "mlp.linear_fc2.weight": Rule("columns", (_HF + "mlp.down_proj.weight",)),
    "decoder.final_layernorm.weight": Rule("replicated", ("model.norm.weight",)),
    OUTPUT_LAYER: Rule("vocab", ("lm_head.weight",)),
}


class Family(ABC):
    """A kind of model: how its configuration is read and how its tensors are named."""

    model_type: ClassVar[str]  # as in config.json
    table: ClassVar[Table] = LLAMA_TABLE

    @abstractmethod
    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """The model's facts.

        Raises:
            ValueError: the configuration asks for something that Megatron would compute differently.
        """

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether ``config`` is of this family."""
        return config.model_type == self.model_type

    def weight_map(self, shape: ModelShape, tensor: int = 1, padded_vocab: int | None = None) -> WeightMap:
        """The conversion of this family's weights; see ``WeightMap``."""
        return WeightMap(shape, self.table, tensor, padded_vocab)


def require(field: str, found: object, *accepted: object) -> None:
    """Refuse a configuration field that has none of the accepted values."""
    if found not in accepted:
        raise ValueError(f"config.json {field}: found {found!r}, accepted: {', '.join(map(repr, accepted))}")


def plain_rope_theta(rope_parameters: object) -> float:
    """The base of unscaled rotary embeddings over the whole head; anything else is refused.

    Megatron-core builds Llama 3's scaling with fixed constants and no other kind, so a scaled model
    would silently run with other frequencies.
    """
    if not isinstance(rope_parameters, dict):
        raise ValueError(f"config.json rope_parameters: found {rope_parameters!r}, accepted: a table")
    require("rope_parameters.rope_type", rope_parameters.get("rope_type", "default"), "default")
    require("rope_parameters.partial_rotary_factor", rope_parameters.get("partial_rotary_factor", 1.0), 1.0)
    return float(rope_parameters["rope_theta"])
