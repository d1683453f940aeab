"""Tiny random models in Hugging Face form, made with transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers, trainers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaModel,
    MistralConfig,
    MixtralConfig,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen3Config,
    Qwen3MoeConfig,
)

CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant: ' }}{% endif %}"
)

# Of Llama 3.1: of heads 16 wide, four of eight frequencies are scaled.
LLAMA3_ROPE = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def tiny_llama(
    directory: Path,
    *,
    tied: bool = False,
    heads: int = 4,
    groups: int = 2,
    seed: int = 0,
    vocab: int = 200,
    **fields: Any,
) -> PreTrainedModel:
    """4 layers, grouped queries, head_dim != hidden / heads; ``fields``: others of the configuration."""
    sizes = _sizes(vocab, hidden_size=72, intermediate_size=96, num_hidden_layers=4, head_dim=16)
    rope = {} if "rope_parameters" in fields else {"rope_theta": 10000.0}
    split = {"num_attention_heads": heads, "num_key_value_heads": groups}
    config = LlamaConfig(**{**sizes, **split, **rope, "tie_word_embeddings": tied, **fields})
    return _write(config, directory, seed)


def larger_llama() -> tuple[LlamaConfig, dict[str, torch.Size]]:
    """Configuration, names and shapes of 444 MB in bf16, of which no tensor is more than 16."""
    config = LlamaConfig(
        vocab_size=8000,
        hidden_size=1024,
        intermediate_size=2816,
        num_hidden_layers=16,
        num_attention_heads=8,
        num_key_value_heads=8,
    )
    config.architectures = ["LlamaForCausalLM"]
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    return config, {name: value.shape for name, value in model.named_parameters()}


def tiny_llama3(directory: Path, *, vocab: int = 200) -> PreTrainedModel:
    """Llama with the scaled frequencies of 3.1, which show from some hundred tokens on."""
    return tiny_llama(
        directory, vocab=vocab, rope_parameters=dict(LLAMA3_ROPE), max_position_embeddings=131072
    )


def tiny_mistral(directory: Path, *, window: int | None = None, vocab: int = 200) -> PreTrainedModel:
    """2 layers of Mistral with a sliding window if asked for."""
    sizes = _sizes(vocab, hidden_size=32, intermediate_size=64, num_hidden_layers=2, head_dim=8)
    return _write(MistralConfig(**sizes, sliding_window=window), directory)


def tiny_qwen2(directory: Path, *, vocab: int = 200) -> PreTrainedModel:
    """4 layers of Qwen2: biases on queries, keys and values, tied embeddings."""
    sizes = _sizes(vocab, hidden_size=64, intermediate_size=96, num_hidden_layers=4)
    return _write(Qwen2Config(**sizes, tie_word_embeddings=True), directory)


def tiny_qwen3(directory: Path, *, vocab: int = 200, seed: int = 0) -> PreTrainedModel:
    """4 layers of Qwen3: norms of queries and keys, head_dim != hidden / heads."""
    sizes = _sizes(vocab, hidden_size=48, intermediate_size=96, num_hidden_layers=4, head_dim=16)
    return _write(Qwen3Config(**sizes), directory, seed)


def tiny_mixtral(directory: Path, *, vocab: int = 200, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """4 layers of Mixtral with 4 experts, of which a token goes through 2."""
    sizes = _sizes(vocab, hidden_size=32, intermediate_size=48, num_hidden_layers=4, head_dim=16)
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2}
    return _write(MixtralConfig(**{**sizes, **experts, **fields}), directory, seed)


def tiny_qwen3_moe(directory: Path, *, vocab: int = 200, seed: int = 0, **fields: Any) -> PreTrainedModel:
    """4 layers of Qwen3 with 6 experts, of which a token goes through 3; their weights do not add up to 1."""
    sizes = _sizes(vocab, hidden_size=48, moe_intermediate_size=40, num_hidden_layers=4, head_dim=16)
    experts = {"num_experts": 6, "num_experts_per_tok": 3, "norm_topk_prob": False}
    return _write(Qwen3MoeConfig(**{**sizes, **experts, **fields}), directory, seed)


def _sizes(vocab: int, **sizes: int) -> dict[str, Any]:
    return {
        "vocab_size": vocab,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.1,
        "pad_token_id": 0,
        "bos_token_id": 1,
        "eos_token_id": 2,
        "attn_implementation": "eager",
        **sizes,
    }


def _write(config: PreTrainedConfig, directory: Path, seed: int = 0) -> PreTrainedModel:
    """fp32 weights of ordinary size."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(config).float().eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # ones hide a wrong norm
                parameter.add_(0.1 * torch.randn_like(parameter))
            elif name.endswith("bias"):  # and zeros a lost bias
                parameter.add_(0.5 * torch.randn_like(parameter))
            elif name.endswith("mlp.gate.weight"):  # and a router of zeros chooses by chance
                parameter.copy_(torch.randn_like(parameter))
    model.save_pretrained(directory)
    return model


def safe_rlhf_model(directory: Path, score_type: str = "cost") -> Path:
    """A score model as safe-rlhf stores it: ``score_head`` with a bias, statistics of a normaliser."""
    config = tiny_llama(directory, vocab=101).config
    torch.manual_seed(3)
    config.architectures = ["LlamaModelForScore"]
    config.score_dim, config.score_type, config.do_normalize = 1, score_type, True
    config.save_pretrained(directory)
    tensors = {f"model.{name}": value for name, value in LlamaModel(config).float().state_dict().items()}
    tensors |= {"score_head.weight": torch.randn(1, config.hidden_size), "score_head.bias": torch.randn(1)}
    tensors |= {"normalizer.mean": torch.tensor([0.3]), "normalizer.var": torch.tensor([4.0])}
    tensors["normalizer.count"] = torch.tensor([17])
    save_file(tensors, directory / "model.safetensors", metadata={"format": "pt"})
    return directory


def byte_tokenizer(directory: Path, chat_template: str | None = None) -> None:
    """A tokenizer of 101 tokens that no other model here has: most characters, a few merges."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    special = ["<unk>", "<s>", "</s>"]
    trainer = trainers.BpeTrainer(vocab_size=101, special_tokens=special, limit_alphabet=80)
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        unk_token="<unk>",
        chat_template=chat_template,
    ).save_pretrained(directory)


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
