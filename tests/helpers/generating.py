"""Tiny models of every family, and Megatron models of them in this process."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from megatron.core.models.gpt import GPTModel
from transformers import PreTrainedModel

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.generation.generate import MegatronGenerator
from gapo_mega.engine.megatron.model import build
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from tests.helpers.tiny import tiny_llama, tiny_llama3, tiny_mistral, tiny_qwen2, tiny_qwen3

VOCABULARY = 101  # not a multiple of anything: the model's table is padded
MODELS: dict[str, Callable[[Path], PreTrainedModel]] = {
    "llama": lambda folder: tiny_llama(folder, vocab=VOCABULARY),
    "llama_tied": lambda folder: tiny_llama(folder, vocab=VOCABULARY, tied=True),
    "llama_groups_of_one": lambda folder: tiny_llama(folder, vocab=VOCABULARY, heads=4, groups=4),
    "mistral": lambda folder: tiny_mistral(folder, vocab=VOCABULARY),
    # The longest prompt and 12 new tokens just fit.
    "mistral_window": lambda folder: tiny_mistral(folder, vocab=VOCABULARY, window=21),
    "llama3": lambda folder: tiny_llama3(folder, vocab=VOCABULARY),
    "qwen2": lambda folder: tiny_qwen2(folder, vocab=VOCABULARY),
    "qwen3": lambda folder: tiny_qwen3(folder, vocab=VOCABULARY, seed=1),
}


def load(folder: Path, dtype: str = "fp32") -> GPTModel:
    """The Megatron model of a Hugging Face directory."""
    shape = shape_of(HFDirectory(folder).config)
    with megatron_device():
        settings = ModelConfig.model_validate({"path": str(folder), "dtype": dtype})
        model = build.build_gpt(shape, settings, ParallelConfig())
        weights.load_hf(model, shape, folder)
    return model


def generator(model: GPTModel, world: groups.Groups, **options: Any) -> MegatronGenerator:
    """With small batches and responses that do not end."""
    defaults: dict[str, Any] = {"vocabulary": VOCABULARY, "pad_id": 0, "eos_ids": [], "batch_size": 4}
    return MegatronGenerator([model], world, **{**defaults, **options})


class UnknownNorm(RMSNorm):
    """The same numbers under a name that the decoder has never heard."""


def make_unknown(model: GPTModel) -> None:
    """Have generation run ``model`` by Megatron's layers."""
    model.decoder.layers[0].input_layernorm.__class__ = UnknownNorm
