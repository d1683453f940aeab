"""Llama 1 and 2, SmolLM2, and other models of the ``llama`` type without rotary scaling."""

from __future__ import annotations

from transformers import LlamaConfig, PreTrainedConfig

from gapo_mega.models.family import Family, plain_rope_theta, require
from gapo_mega.models.shape import ModelShape


class Llama(Family):
    """``LlamaForCausalLM``"""

    model_type = "llama"

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """See ``Family.shape``."""
        assert isinstance(config, LlamaConfig)
        require("hidden_act", config.hidden_act, "silu")
        # With it the output projection has a bias too, which Megatron ties to that of the MLP.
        require("attention_bias", config.attention_bias, False)
        require("mlp_bias", config.mlp_bias, False)
        # Their defaults are filled in by transformers.
        assert config.num_key_value_heads is not None and config.head_dim is not None
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
        )
