"""Builds GPTModels for policy, reference and critic."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import (
    get_gpt_layer_local_spec,
    get_gpt_layer_with_transformer_engine_spec,
)
from megatron.core.transformer import ModuleSpec, TransformerConfig
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules, get_num_layers_to_build
from torch.nn.functional import silu

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.model import experts
from gapo_mega.engine.megatron.model.context import ContextAttention
from gapo_mega.engine.megatron.model.modules import RMSNorm, ValueModel
from gapo_mega.engine.megatron.model.packing import PackedAttention
from gapo_mega.engine.megatron.runtime import releases
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.models.shape import ModelShape
from gapo_mega.optional import transformer_engine_layers

VOCABULARY_DIVISOR = 128  # Megatron's usual padding, times the tensor-parallel size


def padded_vocabulary(vocabulary: int, tensor: int) -> int:
    """The vocabulary size that a model over ``tensor`` tensor-parallel ranks allocates."""
    unit = VOCABULARY_DIVISOR * tensor
    return -(-vocabulary // unit) * unit


def transformer_config(shape: ModelShape, model: ModelConfig, parallel: ParallelConfig) -> TransformerConfig:
    """Megatron's configuration of one model: no dropout, no fusions that need Apex or CUDA."""
    dtype = torch.bfloat16 if model.dtype == "bf16" else torch.float32
    recompute: dict[str, Any] = {}
    if model.recompute == "full":
        recompute = {
            "recompute_granularity": "full",
            "recompute_method": "uniform",
            "recompute_num_layers": 1,
        }
    elif model.recompute == "selective":
        recompute = {"recompute_granularity": "selective"}
    # Megatron's None is one chunk and its plain schedule.
    virtual = parallel.virtual_pipeline if parallel.virtual_pipeline > 1 else None
    window = None if shape.sliding_window is None else (shape.sliding_window - 1, 0)
    return TransformerConfig(
        num_layers=shape.num_layers,
        hidden_size=shape.hidden,
        ffn_hidden_size=shape.ffn,
        num_attention_heads=shape.heads,
        num_query_groups=shape.kv_groups,
        kv_channels=shape.head_dim,
        normalization="RMSNorm",
        layernorm_epsilon=shape.norm_eps,
        gated_linear_unit=True,
        activation_func=silu,
        add_bias_linear=False,
        add_qkv_bias=shape.qkv_bias,
        qk_layernorm=shape.qk_norm,  # also makes Megatron sum these norms' gradients over tensor ranks
        window_size=window,
        hidden_dropout=0.0,
        attention_dropout=0.0,
        attention_softmax_in_fp32=True,
        tensor_model_parallel_size=parallel.tensor,
        pipeline_model_parallel_size=parallel.pipeline,
        context_parallel_size=parallel.context,
        virtual_pipeline_model_parallel_size=virtual,
        sequence_parallel=parallel.sequence_parallel,
        pipeline_dtype=dtype,
        params_dtype=dtype,
        bf16=model.dtype == "bf16",
        use_cpu_initialization=not torch.cuda.is_available(),
        perform_initialization=True,
        gradient_accumulation_fusion=False,
        persist_layer_norm=False,
        apply_rope_fusion=False,
        bias_activation_fusion=False,
        bias_dropout_fusion=False,
        masked_softmax_fusion=False,
        batch_p2p_sync=False,
        # Interleaved, two stages exchange tensors in both directions at once, and a batch of messages between
        # two ranks matches by order alone.
        batch_p2p_comm=virtual is None,
        overlap_p2p_comm=virtual is not None,
        calculate_per_token_loss=True,  # gradients are sums, over microbatches and over data ranks
        **recompute,
        **_expert_settings(shape, parallel),
    )


def _expert_settings(shape: ModelShape, parallel: ParallelConfig) -> dict[str, Any]:
    """Experts that compute what transformers' do: no token is dropped, and the router has no loss."""
    if shape.experts is None:
        return {}
    return {
        "num_moe_experts": shape.experts.count,
        "moe_ffn_hidden_size": shape.ffn,
        "moe_router_topk": shape.experts.chosen,
        # A softmax over the chosen ones alone is the softmax over all, divided by the sum of the chosen.
        "moe_router_pre_softmax": not shape.experts.normalized,
        "moe_router_load_balancing_type": "none",
        "moe_token_dispatcher_type": "allgather",
        "expert_model_parallel_size": parallel.expert,
        "expert_tensor_parallel_size": parallel.experts_split,
    }


def layer_spec(
    config: TransformerConfig, vp_stage: int | None = None
) -> ModuleSpec | TransformerBlockSubmodules:
    """Transformer Engine's layers if it is really installed and there is a GPU, else Megatron's own."""
    if transformer_engine_layers():
        layer = get_gpt_layer_with_transformer_engine_spec(
            num_experts=config.num_moe_experts, qk_layernorm=config.qk_layernorm
        )
        if config.num_moe_experts is not None:
            experts.use_own_router(layer)
        return layer
    layer = get_gpt_layer_local_spec(num_experts=config.num_moe_experts, normalization="RMSNorm")
    layer.submodules.input_layernorm = RMSNorm
    layer.submodules.pre_mlp_layernorm = RMSNorm
    attention = layer.submodules.self_attention.submodules
    attention.core_attention = PackedAttention if config.context_parallel_size == 1 else ContextAttention
    if config.qk_layernorm:
        attention.q_layernorm = attention.k_layernorm = RMSNorm
    if config.num_moe_experts is not None:
        experts.use_own_router(layer)
    return TransformerBlockSubmodules(
        layer_specs=[layer] * get_num_layers_to_build(config, vp_stage), layer_norm=RMSNorm
    )


def build_gpt(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, value_heads: int | None = None
) -> GPTModel:
    """Build this rank's pipeline stage of a model with random weights, on this rank's device.

    The stage is one model: its layers follow each other, whatever ``parallel.virtual_pipeline`` says.

    ``value_heads``: the number of values per position; None for a language model.
    """
    whole = parallel.model_copy(update={"virtual_pipeline": 1})
    return _chunk(shape, transformer_config(shape, model, whole), None, value_heads)


def build_chunks(
    shape: ModelShape, model: ModelConfig, parallel: ParallelConfig, value_heads: int | None = None
) -> list[GPTModel]:
    """Build this rank's part of a model for training, in the order in which tokens pass through it.

    One model, as ``build_gpt``, or ``parallel.virtual_pipeline`` many: tokens go through the first of every
    stage, then through the second of every stage, and so on. All share one Megatron configuration.
    """
    config = transformer_config(shape, model, parallel)
    virtual = config.virtual_pipeline_model_parallel_size
    numbers = [None] if virtual is None else range(virtual)
    return [_chunk(shape, config, number, value_heads) for number in numbers]


def _chunk(
    shape: ModelShape, config: TransformerConfig, vp_stage: int | None, value_heads: int | None
) -> GPTModel:
    last = (config.virtual_pipeline_model_parallel_size or 1) - 1
    number = vp_stage or 0
    kwargs: dict[str, Any] = {
        "config": config,
        "transformer_layer_spec": layer_spec(config, vp_stage),
        "vocab_size": padded_vocabulary(shape.vocab, config.tensor_model_parallel_size),
        "max_sequence_length": shape.max_positions,
        "pre_process": parallel_state.is_pipeline_first_stage() and number == 0,
        "post_process": parallel_state.is_pipeline_last_stage() and number == last,
        "position_embedding_type": "rope",
        "rotary_base": shape.rope_theta,
        "vp_stage": vp_stage,
    }
    if shape.rope_scaling_factor is not None:
        kwargs |= {"rope_scaling": True, "rope_scaling_factor": shape.rope_scaling_factor}
    with releases.without_advice():
        if value_heads is None:
            built = GPTModel(share_embeddings_and_output_weights=shape.tied, **kwargs)
        else:
            built = ValueModel(heads=value_heads, **kwargs)
    experts.use_own_dispatchers(built)
    return built.to(device())
