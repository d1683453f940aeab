"""Mistral 7B and its descendants of the ``mistral`` type, with a sliding window (v0.1) or without."""

from __future__ import annotations

from transformers import MistralConfig, PreTrainedConfig

from gapo_mega.models.family import Family, llama_like
from gapo_mega.models.shape import ModelShape


class Mistral(Family):
    """The family of transformers' ``MistralForCausalLM``."""

    model_type = "mistral"
    reads = frozenset({"sliding_window"})

    def shape(self, config: PreTrainedConfig) -> ModelShape:
        """Passes the sliding window on: whoever runs the model must keep to it."""
        assert isinstance(config, MistralConfig)
        return llama_like(config, sliding_window=config.sliding_window)
