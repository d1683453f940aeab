"""Mistral 7B and its descendants of the ``mistral`` type, with or without a sliding window."""

from __future__ import annotations

from transformers import MistralConfig, PreTrainedConfig

from gapo_mega.models.family import Family, plain_rope_theta, require
from gapo_mega.models.shape import ModelShape


class Mistral(Family):
    """``MistralForCausalLM``"""

    model_type = "mistral"

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """See ``Family.shape``. The window is passed on: whoever runs the model keeps to it."""
        assert isinstance(config, MistralConfig)
        require("hidden_act", config.hidden_act, "silu")
        assert config.head_dim is not None  # filled in by transformers
        return ModelShape(
            family=self.model_type,
            num_layers=config.num_hidden_layers,
            hidden=config.hidden_size,
            ffn=config.intermediate_size,
            heads=config.num_attention_heads,
            kv_groups=config.num_key_value_heads,
            head_dim=config.head_dim,
            vocab=config.vocab_size,
            tied=config.tie_word_embeddings,
            rope_theta=plain_rope_theta(config.rope_parameters),
            norm_eps=config.rms_norm_eps,
            qkv_bias=False,
            max_positions=config.max_position_embeddings,
            sliding_window=config.sliding_window,
        )
