"""Llama 1, 2, 3, 3.1 and 3.2, SmolLM2, and other models of the ``llama`` type."""

from __future__ import annotations

from transformers import LlamaConfig, PreTrainedConfig

from gapo_mega.models.family import Family, llama_like
from gapo_mega.models.shape import ModelShape


class Llama(Family):
    """The family of transformers' ``LlamaForCausalLM``.

    With ``attention_bias`` the output projection has a bias, too, which Megatron ties to that of the MLP.
    """

    model_type = "llama"

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        assert isinstance(config, LlamaConfig)
        return llama_like(config)
