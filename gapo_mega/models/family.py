"""What a model family provides, and what most of them share."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from typing import Any, ClassVar

from transformers import PreTrainedConfig

from gapo_mega.models.config_fields import require
from gapo_mega.models.mapping import EMBEDDING, OUTPUT_LAYER, ROUTER, Rule, Table, WeightMap
from gapo_mega.models.shape import Experts, ModelShape

_MEGATRON = "decoder.layers.{layer}."
_HF = "model.layers.{layer}."

# Tensor names of Llama, which most later families took over. Rows of parameters that a model does
# not have (biases, norms of queries and keys) do no harm.
LLAMA_TABLE: Table = {
    EMBEDDING: Rule("vocab", ("model.embed_tokens.weight",)),
    _MEGATRON + "input_layernorm.weight": Rule("replicated", (_HF + "input_layernorm.weight",)),
    _MEGATRON + "self_attention.linear_qkv.weight": Rule(
        "qkv", tuple(f"{_HF}self_attn.{x}_proj.weight" for x in "qkv")
    ),
    _MEGATRON + "self_attention.linear_qkv.bias": Rule(
        "qkv", tuple(f"{_HF}self_attn.{x}_proj.bias" for x in "qkv")
    ),
    _MEGATRON + "self_attention.q_layernorm.weight": Rule("replicated", (_HF + "self_attn.q_norm.weight",)),
    _MEGATRON + "self_attention.k_layernorm.weight": Rule("replicated", (_HF + "self_attn.k_norm.weight",)),
    _MEGATRON + "self_attention.linear_proj.weight": Rule("columns", (_HF + "self_attn.o_proj.weight",)),
    _MEGATRON + "pre_mlp_layernorm.weight": Rule("replicated", (_HF + "post_attention_layernorm.weight",)),
    _MEGATRON + "mlp.linear_fc1.weight": Rule(
        "gated", (_HF + "mlp.gate_proj.weight", _HF + "mlp.up_proj.weight")
    ),
    _MEGATRON + "mlp.linear_fc2.weight": Rule("columns", (_HF + "mlp.down_proj.weight",)),
    "decoder.final_layernorm.weight": Rule("replicated", ("model.norm.weight",)),
    OUTPUT_LAYER: Rule("vocab", ("lm_head.weight",)),
}


def expert_table(moe: str, gate: str, up: str, down: str) -> Table:
    """Llama's table with experts in the place of the MLP.

    ``moe``: the module of a layer that holds the router ``gate`` and the list ``experts``; ``gate``, ``up``,
    ``down``: an expert's projections.
    """
    expert = f"{_HF}{moe}.experts.{{expert}}."
    kept = {name: rule for name, rule in LLAMA_TABLE.items() if not name.startswith(_MEGATRON + "mlp.")}
    ours = _MEGATRON + "mlp.experts.local_experts.{expert}."
    return {
        **kept,
        _MEGATRON + ROUTER: Rule("replicated", (f"{_HF}{moe}.gate.weight",)),
        ours + "linear_fc1.weight": Rule("gated", (f"{expert}{gate}.weight", f"{expert}{up}.weight")),
        ours + "linear_fc2.weight": Rule("columns", (f"{expert}{down}.weight",)),
    }


# Megatron-core 0.16.1 scales rotary frequencies as Llama 3.1 does: by any factor, but with these constants.
LLAMA3_ROPE = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
_SIZES = (
    "head_dim",
    "hidden_size",
    "intermediate_size",
    "max_position_embeddings",
    "num_attention_heads",
    "num_hidden_layers",
    "num_key_value_heads",
    "vocab_size",
)
_OF_LLAMA3 = {"factor", *LLAMA3_ROPE}


class Family(ABC):
    """A kind of model: how its configuration is read and how its tensors are named."""

    model_type: ClassVar[str]  # as in config.json
    table: ClassVar[Table] = LLAMA_TABLE
    # Fields of config.json that ``shape`` reads or refuses, beside those that ``llama_like`` reads.
    reads: ClassVar[frozenset[str]] = frozenset()

    @abstractmethod
    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """The model's facts.

        Raises:
            ValueError: the configuration asks for something that Megatron would compute differently.
        """

    def matches(self, config: PreTrainedConfig) -> bool:
        """Whether ``config`` is of this family."""
        return config.model_type == self.model_type

    def weight_map(
        self,
        shape: ModelShape,
        tensor: int = 1,
        padded_vocab: int | None = None,
        expert_tensor: int | None = None,
    ) -> WeightMap:
        """The conversion of this family's weights; see ``WeightMap``."""
        return WeightMap(shape, self.table, tensor, padded_vocab, expert_tensor)


def llama_like(
    config: PreTrainedConfig,
    *,
    qkv_bias: bool = False,
    qk_norm: bool = False,
    sliding_window: int | None = None,
) -> ModelShape:
    """The facts of a model whose configuration has Llama's fields; the keywords are ``ModelShape``'s.

    Raises:
        ValueError: another activation than SiLU, rotary embeddings that ``rotary`` refuses, sizes that no
            model has, a window below 1, or ``layer_types`` of another attention.
    """
    fields: dict[str, Any] = config.to_dict()
    require("hidden_act", fields["hidden_act"], "silu", "swish")
    _check_sizes(fields)
    _check_attention(fields, sliding_window)
    theta, factor = rotary(fields["rope_parameters"])
    heads = fields["num_attention_heads"]
    return ModelShape(
        family=config.model_type,
        num_layers=fields["num_hidden_layers"],
        hidden=fields["hidden_size"],
        ffn=fields["intermediate_size"],
        heads=heads,
        kv_groups=fields["num_key_value_heads"] or heads,
        # Where a configuration class has no such field, transformers takes it from config.json all the same.
        head_dim=fields["hidden_size"] // heads if fields.get("head_dim") is None else fields["head_dim"],
        vocab=fields["vocab_size"],
        tied=fields["tie_word_embeddings"],
        rope_theta=theta,
        norm_eps=fields["rms_norm_eps"],
        qkv_bias=qkv_bias,
        max_positions=fields["max_position_embeddings"],
        sliding_window=sliding_window,
        qk_norm=qk_norm,
        rope_scaling_factor=factor,
    )


def experts_of(count: int, chosen: int, normalized: bool) -> Experts:
    """The experts of every layer; ``config.json`` calls ``count`` num_local_experts or num_experts.

    Raises:
        ValueError: fewer experts than 2, more chosen ones than there are, or one whose probability is divided
            by itself, which Megatron does not compute.
    """
    if count < 2:
        raise ValueError(f"config.json num_local_experts: found {count}, accepted: 2 or more")
    least = 2 if normalized else 1
    if not least <= chosen <= count:
        raise ValueError(
            f"config.json num_experts_per_tok: found {chosen}, accepted: {least} to {count} experts"
        )
    return Experts(count, chosen, normalized)


def _check_sizes(fields: dict[str, Any]) -> None:
    for field in _SIZES:
        found = fields.get(field)
        if found is not None and found < 1:
            raise ValueError(f"config.json {field}: found {found!r}, accepted: 1 or more")
    if not 0 < fields["rms_norm_eps"] < 1:
        found = fields["rms_norm_eps"]
        raise ValueError(f"config.json rms_norm_eps: found {found!r}, accepted: a number above 0 and below 1")


def _check_attention(fields: dict[str, Any], window: int | None) -> None:
    """Megatron has one window for all layers, or none; ``layer_types`` must say the same."""
    if window is not None and window < 1:
        raise ValueError(f"config.json sliding_window: found {window!r}, accepted: null, or a number above 0")
    for kind in fields.get("layer_types") or ():
        require("layer_types", kind, "full_attention" if window is None else "sliding_attention")


def rotary(rope_parameters: object) -> tuple[float, float | None]:
    """Base of the rotary embeddings and Llama 3's scaling factor, ``None`` where they are not scaled.

    Takes the table that transformers 5 makes of every notation: its own ``rope_parameters``, and the
    ``rope_theta`` and ``rope_scaling`` of older ones.

    Raises:
        ValueError: another kind of scaling, other constants than ``LLAMA3_ROPE``, a rotation of part of a
            head, or tables for several kinds of layers.
    """
    if not isinstance(rope_parameters, dict):
        raise ValueError(f"config.json rope_parameters: found {rope_parameters!r}, accepted: a table")
    kind = rope_parameters.get("rope_type", "default")
    require("rope_parameters.rope_type", kind, "default", "llama3")
    require("rope_parameters.partial_rotary_factor", rope_parameters.get("partial_rotary_factor", 1.0), 1.0)
    require("rope_parameters.attention_factor", rope_parameters.get("attention_factor"), None, 1.0)
    theta = _positive("rope_theta", rope_parameters)
    known = {"rope_type", "type", "rope_theta", "partial_rotary_factor", "attention_factor", *_OF_LLAMA3}
    for field in sorted(rope_parameters.keys() - known):
        require(f"rope_parameters.{field}", rope_parameters[field], None)
    if kind == "default":
        require("rope_parameters.factor", rope_parameters.get("factor"), None, 1.0)
        return theta, None
    for field, constant in LLAMA3_ROPE.items():
        require(f"rope_parameters.{field}", rope_parameters.get(field), constant)
    return theta, _positive("factor", rope_parameters)


def _positive(field: str, rope_parameters: dict[str, Any]) -> float:
    found = rope_parameters.get(field)
    if isinstance(found, bool) or not isinstance(found, int | float) or not 0 < found < math.inf:
        raise ValueError(f"config.json rope_parameters.{field}: found {found!r}, accepted: a number above 0")
    return float(found)


def require_full_attention(config: PreTrainedConfig) -> None:
    """Refuse a Qwen-style configuration whose layers do not all attend to everything before.

    Megatron has one window for a model's layers; these configurations give it to some. ``llama_like`` refuses
    ``layer_types`` of another attention.
    """
    require("use_sliding_window", config.to_dict()["use_sliding_window"], False)
