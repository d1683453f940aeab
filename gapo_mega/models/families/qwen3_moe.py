"""Qwen3-30B-A3B, Qwen3-235B-A22B: Qwen3 with experts in the place of every MLP."""

from __future__ import annotations

from dataclasses import replace

from transformers import PreTrainedConfig, Qwen3MoeConfig

from gapo_mega.models.config_fields import require
from gapo_mega.models.family import Family, expert_table, experts_of, llama_like, require_full_attention
from gapo_mega.models.shape import ModelShape


class Qwen3Moe(Family):
    """The family of transformers' ``Qwen3MoeForCausalLM``.

    Every layer has experts: ``decoder_sparse_step`` and ``mlp_only_layers`` must say so.
    """

    model_type = "qwen3_moe"
    table = expert_table("mlp", gate="gate_proj", up="up_proj", down="down_proj")
    reads = frozenset(
        {
            "use_sliding_window",
            "sliding_window",
            "num_local_experts",
            "num_experts",
            "num_experts_per_tok",
            "moe_intermediate_size",
            "norm_topk_prob",
            "decoder_sparse_step",
            "mlp_only_layers",
        }
    )

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        assert isinstance(config, Qwen3MoeConfig)
        require_full_attention(config)
        require("decoder_sparse_step", config.decoder_sparse_step, 1)
        require("mlp_only_layers", config.mlp_only_layers, [], None)
        width = config.moe_intermediate_size
        if width < 1:
            raise ValueError(f"config.json moe_intermediate_size: found {width!r}, accepted: 1 or more")
        experts = experts_of(config.num_experts, config.num_experts_per_tok, config.norm_topk_prob)
        return replace(llama_like(config, qk_norm=True), ffn=width, experts=experts)
