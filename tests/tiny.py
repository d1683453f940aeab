"""Tiny random models in Hugging Face form, made with transformers."""

from __future__ import annotations

from pathlib import Path

import torch
from transformers import (
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
)


def tiny_llama(
    directory: Path, *, tied: bool = False, heads: int = 4, groups: int = 2, seed: int = 0, vocab: int = 200
) -> PreTrainedModel:
    """4 layers, grouped queries, head_dim != hidden / heads; fp32 weights of ordinary size."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        vocab_size=vocab,
        hidden_size=72,
        intermediate_size=96,
        num_hidden_layers=4,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        head_dim=16,
        max_position_embeddings=128,
        rope_theta=10000.0,
        tie_word_embeddings=tied,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = LlamaForCausalLM(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones hide a wrong norm
                parameter.add_(0.1 * torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def tiny_mistral(directory: Path, *, window: int | None = None, vocab: int = 200) -> PreTrainedModel:
    """2 layers of Mistral with a sliding window if asked for."""
    torch.manual_seed(0)
    config = MistralConfig(
        vocab_size=vocab,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=128,
        sliding_window=window,
        initializer_range=0.1,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
        attn_implementation="eager",
    )
    model = MistralForCausalLM(config).float().eval()
    model.save_pretrained(directory)
    return model


def tiny_chat_model(directory: Path, tokenizer_source: Path, family: str = "llama") -> None:
    """A tiny random model, with the chat template and special tokens of a real tokenizer.

    The vocabulary is learned anew and small: with 49,152 rows the logits would cost more than all the rest.
    """
    original = AutoTokenizer.from_pretrained(tokenizer_source)
    text = Path(__file__).read_text(encoding="utf-8").splitlines()
    tokenizer = original.train_new_from_iterator([text], vocab_size=700)
    assert tokenizer.chat_template == original.chat_template and tokenizer.eos_token == original.eos_token
    if family == "llama":
        model = tiny_llama(directory, vocab=len(tokenizer), tied=True)
    else:
        model = tiny_mistral(directory, vocab=len(tokenizer))
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.generation_config.pad_token_id = tokenizer.pad_token_id
    model.save_pretrained(directory)
    tokenizer.save_pretrained(directory)
