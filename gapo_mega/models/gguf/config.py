"""Hugging Face configurations of GGUF files: the same facts under other names.

llama.cpp computes by its own tables per architecture, so a key that this file does not know may mean another
model: it is refused.
"""

from __future__ import annotations

from typing import Any

import gguf
import numpy as np
import torch
from torch import Tensor
from transformers import (
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    PreTrainedConfig,
    PreTrainedModel,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from gapo_mega.models.family import LLAMA3_ROPE
from gapo_mega.models.gguf.file import GGUFFile

ROPE_FREQS = "rope_freqs.weight"
EMBEDDING = "token_embd.weight"
# Mistral is stored as "llama": without the window of v0.1 the two are one model.
ARCHITECTURES: dict[str, tuple[type[PreTrainedConfig], type[PreTrainedModel]]] = {
    "llama": (LlamaConfig, LlamaForCausalLM),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM),
}

# Keys below "ARCHITECTURE." that the functions below read by name.
_READ = {
    "attention.head_count",
    "attention.head_count_kv",
    "attention.key_length",
    "attention.layer_norm_rms_epsilon",
    "attention.value_length",
    "block_count",
    "context_length",
    "embedding_length",
    "feed_forward_length",
    "rope.dimension_count",
    "rope.freq_base",
    "vocab_size",
}
# Keys that do not change what is computed; "finetuned" and the original length describe an absent scaling.
_IDLE = {
    "attention.layer_norm_epsilon",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
    "tensor_data_layout",
}
# Keys accepted with these values only, which change nothing: plain models have them.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "attention.causal": (None, True),
    "attention.sliding_window": (None, 0),
    "expert_count": (None, 0),
    "expert_used_count": (None, 0),
    "pooling_type": (None, 0),
    "rope.scale_linear": (None, 1.0),
    "rope.scaling.attn_factor": (None, 1.0),
    "rope.scaling.factor": (None, 0.0, 1.0),
    "rope.scaling.type": (None, "none"),
}
_TOKENS = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown", "eot": "eot", "eom": "eom"}

# Divisors come through fp32 powers and, for middle frequencies, a difference that loses up to
# the factor (32) times their rounding; constants of another model differ by percents.
_DIVISOR_TOLERANCE = 5e-5


def hf_config(file: GGUFFile) -> PreTrainedConfig:
    """The configuration of the model in ``file``, for fp32 weights.

    Raises:
        ValueError: another architecture; keys that are unknown or ask for what its Hugging Face class does
            not compute (experts, a sliding window, rotary scalings other than Llama 3's).
    """
    file.require("general.type", None, "model")
    file.require("general.architecture", *ARCHITECTURES)
    name = architecture(file)
    _refuse_unknown_keys(file, name)
    kind, model = ARCHITECTURES[name]
    heads = file.integer(f"{name}.attention.head_count")
    hidden = file.integer(f"{name}.embedding_length")
    fields: dict[str, Any] = {
        "vocab_size": _vocab_size(file, name),
        "hidden_size": hidden,
        "intermediate_size": file.integer(f"{name}.feed_forward_length"),
        "num_hidden_layers": file.integer(f"{name}.block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": file.optional_integer(f"{name}.attention.head_count_kv") or heads,
        "head_dim": _head_dim(file, name, hidden // heads),
        "max_position_embeddings": file.integer(f"{name}.context_length"),
        "rms_norm_eps": file.number(f"{name}.attention.layer_norm_rms_epsilon"),
        "rope_parameters": _default_rope(file, name),
        "tie_word_embeddings": "output.weight" not in file.tensors,
    }
    for token in ("bos", "eos", "pad"):
        fields[f"{token}_token_id"] = token_id(file, token, fields["vocab_size"])
    config = kind(**fields)
    if name == "llama" and ROPE_FREQS in file.tensors:
        fields["rope_parameters"] = _scaled_rope(file, config)
        config = kind(**fields)
    config.architectures = [model.__name__]
    config.dtype = torch.float32
    return config


def generation_config(file: GGUFFile, config: PreTrainedConfig) -> GenerationConfig:
    """Generation settings with the special tokens of ``config``, and all that end a response in llama.cpp.

    Those are the ends of the text (eos), of a turn (eot) and of a message (eom).
    """
    ends = [token_id(file, token, config.vocab_size) for token in ("eos", "eot", "eom")]
    several = list(dict.fromkeys(end for end in ends if end is not None))
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id,
        eos_token_id=several if len(several) > 1 else next(iter(several), None),
        pad_token_id=config.pad_token_id,
    )


def architecture(file: GGUFFile) -> str:
    """llama.cpp's name of the architecture."""
    return str(file.get("general.architecture"))


def token_id(file: GGUFFile, token: str, vocab: int) -> int | None:
    """The id in ``[0, vocab)`` of a token of ``_TOKENS``, ``None`` without one."""
    key = f"tokenizer.ggml.{_TOKENS[token]}_token_id"
    value = file.optional_integer(key)
    if value is not None and not 0 <= value < vocab:
        raise file.error(key, value, f"0 to {vocab - 1}")
    return value


def dequantized(tensor: gguf.ReaderTensor) -> Tensor:
    """A tensor in fp32, its outermost dimension first; ``NotImplementedError`` for unknown quantisations."""
    return torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type).astype(np.float32))


def _refuse_unknown_keys(file: GGUFFile, name: str) -> None:
    for suffix, accepted in _NEUTRAL.items():
        file.require(f"{name}.{suffix}", *accepted)
    for key in file.names():
        section, _, suffix = key.partition(".")
        if section == name and suffix not in _READ | _IDLE | set(_NEUTRAL):
            raise file.error(key, file.get(key), "a model without this key")


def _vocab_size(file: GGUFFile, name: str) -> int:
    """Rows of the embedding; a vocabulary may have fewer tokens, not more."""
    if EMBEDDING not in file.tensors:
        raise ValueError(f"GGUF file {file.path}: no tensor {EMBEDDING}")
    rows = int(file.tensors[EMBEDDING].shape[-1])
    file.require(f"{name}.vocab_size", None, rows)
    return rows


def _head_dim(file: GGUFFile, name: str, default: int) -> int:
    """Width of a head, which is the same for queries, keys and values, and rotated as a whole."""
    rotated = file.optional_integer(f"{name}.rope.dimension_count")
    width = file.optional_integer(f"{name}.attention.key_length") or rotated or default
    file.require(f"{name}.attention.value_length", None, width)
    file.require(f"{name}.rope.dimension_count", None, width)
    return width


def _default_rope(file: GGUFFile, name: str) -> dict[str, Any]:
    return {"rope_type": "default", "rope_theta": file.number(f"{name}.rope.freq_base", 10000.0)}


def _scaled_rope(file: GGUFFile, config: PreTrainedConfig) -> dict[str, Any]:
    """Llama 3's rotary scaling from what the file has instead: each frequency's divisor, ``[head_dim / 2]``.

    The lowest frequency is divided by the factor itself, the other constants are Llama 3.1's and 3.2's: the
    divisors computed from these must be those of the file.
    """
    stored = dequantized(file.tensors[ROPE_FREQS])
    factor = float(stored.max())
    rope = dict(config.rope_parameters)
    if factor == 1.0 and float(stored.min()) == 1.0:
        return rope
    scaled = {**rope, "rope_type": "llama3", "factor": factor, **LLAMA3_ROPE}
    plain = _frequencies(config, scaled | {"factor": 1.0})
    expected = plain / _frequencies(config, scaled)
    if stored.shape != expected.shape or not torch.allclose(
        stored, expected, rtol=_DIVISOR_TOLERANCE, atol=0
    ):
        raise file.error(
            ROPE_FREQS, _ends(stored), f"Llama 3's divisors, {_ends(expected)}, or no such tensor"
        )
    return scaled


def _frequencies(config: PreTrainedConfig, rope: dict[str, Any]) -> Tensor:
    """transformers' rotary frequencies ``[head_dim / 2]`` in radians per token."""
    scaled = type(config)(**{**config.to_dict(), "rope_parameters": rope})
    frequencies, _ = ROPE_INIT_FUNCTIONS["llama3"](scaled, torch.device("cpu"))
    assert isinstance(frequencies, Tensor)
    return frequencies


def _ends(values: Tensor) -> str:
    """The first and the last numbers."""
    return f"{values.numel()} numbers from {values[0].item():.6g} to {values[-1].item():.6g}"
