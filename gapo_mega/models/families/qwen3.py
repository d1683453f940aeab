"""Qwen3 (dense): Llama with an RMSNorm over each head of queries and keys."""

from __future__ import annotations

from transformers import PreTrainedConfig, Qwen3Config

from gapo_mega.models.family import Family, llama_like, require_full_attention
from gapo_mega.models.shape import ModelShape


class Qwen3(Family):
    """The family of transformers' ``Qwen3ForCausalLM``.

    With ``attention_bias`` the output projection has a bias, too, which Megatron ties to that of the MLP.
    """

    model_type = "qwen3"
    reads = frozenset({"use_sliding_window", "sliding_window"})

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        assert isinstance(config, Qwen3Config)
        require_full_attention(config)
        return llama_like(config, qk_norm=True)
