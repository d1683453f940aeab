"""Qwen2 and Qwen2.5: Llama with biases on queries, keys and values."""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen2Config

from gapo_mega.models.family import Family, llama_like, require_full_attention
from gapo_mega.models.shape import ModelShape


class Qwen2(Family):
    """The family of transformers' ``Qwen2ForCausalLM``."""

    model_type = "qwen2"
    # transformers does not ask for attention_bias here: Q, K and V have biases, whatever it says.
    reads = frozenset({"attention_bias", "use_sliding_window", "sliding_window"})

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        assert isinstance(config, Qwen2Config)
        require_full_attention(config)
        return llama_like(config, qkv_bias=True)
