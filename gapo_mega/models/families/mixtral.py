"""Mixtral 8x7B and 8x22B: Mistral with experts in the place of every MLP."""

from __future__ import annotations

from dataclasses import replace

from transformers import MixtralConfig, PreTrainedConfig

from gapo_mega.models.family import Family, expert_table, experts_of, llama_like
from gapo_mega.models.shape import ModelShape


class Mixtral(Family):
    """The family of transformers' ``MixtralForCausalLM``."""

    model_type = "mixtral"
    table = expert_table("block_sparse_moe", gate="w1", up="w3", down="w2")
    reads = frozenset({"sliding_window", "num_local_experts", "num_experts_per_tok"})

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Passes the sliding window on, as ``Mistral`` does."""
        assert isinstance(config, MixtralConfig)
        experts = experts_of(config.num_local_experts, config.num_experts_per_tok, normalized=True)
        return replace(llama_like(config, sliding_window=config.sliding_window), experts=experts)
