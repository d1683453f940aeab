"""GGUF files of tiny transformers models, with the keys and the tensor order of llama.cpp's own converter."""

from __future__ import annotations

import math
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from gguf import TokenType
from tokenizers.pre_tokenizers import ByteLevel
from torch import Tensor
from transformers import PreTrainedModel

ARCHITECTURE = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
_LAYER_NAMES = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_NAMES = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}

Metadata = dict[str, object]


def write_gguf(
    path: Path,
    metadata: Mapping[str, object],
    tensors: Mapping[str, Tensor],
    kind: gguf.GGMLQuantizationType = gguf.GGMLQuantizationType.F32,
) -> Path:
    """Write a file: keys whose value is None are left out, matrices become ``kind``, vectors stay fp32."""
    writer = gguf.GGUFWriter(path, str(metadata["general.architecture"]))
    for key, value in metadata.items():
        if value is not None and key != "general.architecture":
            _put(writer, key, value)
    for name, tensor in tensors.items():
        stored = kind if tensor.ndim > 1 else gguf.GGMLQuantizationType.F32
        data = gguf.quantize(tensor.detach().numpy().astype(np.float32), stored)
        writer.add_tensor(name, data, raw_dtype=stored)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def _put(writer: gguf.GGUFWriter, key: str, value: object) -> None:
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    else:
        assert isinstance(value, list)
        writer.add_array(key, [int(item) if isinstance(item, TokenType) else item for item in value])


def metadata_of(model: PreTrainedModel, vocabulary: Metadata | None = None) -> Metadata:
    """What llama.cpp's converter writes for the model; ``vocabulary``: in place of one of single bytes."""
    config = model.config
    name = ARCHITECTURE[config.model_type]
    keys: Metadata = {
        "block_count": config.num_hidden_layers,
        "context_length": config.max_position_embeddings,
        "embedding_length": config.hidden_size,
        "feed_forward_length": config.intermediate_size,
        "attention.head_count": config.num_attention_heads,
        "attention.head_count_kv": config.num_key_value_heads,
        "attention.layer_norm_rms_epsilon": config.rms_norm_eps,
        "rope.freq_base": float(config.rope_parameters["rope_theta"]),
    }
    if name == "llama":
        keys |= {"vocab_size": config.vocab_size, "rope.dimension_count": _head_dim(model)}
    if name != "qwen2":
        keys |= {"attention.key_length": _head_dim(model), "attention.value_length": _head_dim(model)}
    default = single_bytes_spm() if name == "llama" else single_bytes_bpe()
    prefixed = {f"{name}.{key}": value for key, value in keys.items()}
    return {"general.architecture": name, "general.type": "model"} | prefixed | (vocabulary or default)


def single_bytes_spm() -> Metadata:
    """SentencePiece: three special tokens, the 256 bytes, a letter and a space: 262 tokens."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁a", "▁", "a"]
    types = [TokenType.UNKNOWN, *[TokenType.CONTROL] * 2, *[TokenType.BYTE] * 256, *[TokenType.NORMAL] * 3]
    return {
        "tokenizer.ggml.model": "llama",
        "tokenizer.ggml.pre": "default",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.scores": [*[0.0] * 259, -1.0, -2.0, -3.0],
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.unknown_token_id": 0,
    }


def single_bytes_bpe(rule: str = "qwen2") -> Metadata:
    """Byte-level: the 256 bytes, one merge, the end of a text: 258 tokens."""
    return byte_level([*sorted(ByteLevel.alphabet()), "ab"], ["a b"], rule)


def byte_level(
    tokens: list[str],
    merges: list[str],
    rule: str,
    control: tuple[str, ...] = ("<|endoftext|>",),
    defined: tuple[str, ...] = (),
) -> Metadata:
    """A byte-level vocabulary: tokens, those of control (the last of them ends texts), user-defined ones."""
    types = [TokenType.NORMAL] * len(tokens) + [TokenType.CONTROL] * len(control)
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": rule,
        "tokenizer.ggml.tokens": [*tokens, *control, *defined],
        "tokenizer.ggml.token_type": types + [TokenType.USER_DEFINED] * len(defined),
        "tokenizer.ggml.merges": merges,
        "tokenizer.ggml.eos_token_id": len(tokens) + len(control) - 1,
        "tokenizer.ggml.add_bos_token": False,
    }


def tensors_of(model: PreTrainedModel, *, rotary_order: bool = True) -> dict[str, Tensor]:
    """llama.cpp's names; rows of Q and K of ``llama`` in its order unless ``rotary_order`` is false."""
    config = model.config
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    tensors = {}
    for name, tensor in model.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue
        if ARCHITECTURE[config.model_type] == "llama" and rotary_order:
            tensor = _pairs_of_neighbours(tensor, heads.get(name.split(".")[-2]))
        tensors[_stored_name(name)] = tensor
    if config.rope_parameters["rope_type"] == "llama3":
        tensors["rope_freqs.weight"] = torch.tensor(divisors(config.rope_parameters, _head_dim(model)))
    return tensors


def divisors(rope: Mapping[str, float], head_dim: int) -> list[float]:
    """Of each rotary frequency in Llama 3.1: its wavelength in tokens against the length trained first."""
    factor, length = rope["factor"], rope["original_max_position_embeddings"]
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    result = []
    for pair in range(head_dim // 2):
        turns = length * rope["rope_theta"] ** (-2 * pair / head_dim) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))  # of the frequency as it was
        result.append(1 / (share + (1 - share) / factor))
    return result


def _head_dim(model: PreTrainedModel) -> int:
    fields = model.config.to_dict()
    return fields.get("head_dim") or fields["hidden_size"] // fields["num_attention_heads"]


def _pairs_of_neighbours(tensor: Tensor, heads: int | None) -> Tensor:
    if heads is None:
        return tensor
    return torch.cat(
        [head.unflatten(0, (2, -1)).transpose(0, 1).flatten(0, 1) for head in tensor.chunk(heads)]
    )


def _stored_name(name: str) -> str:
    module, _, suffix = name.rpartition(".")
    if not module.startswith("model.layers."):
        return f"{_NAMES[module]}.{suffix}"
    layer, _, part = module.removeprefix("model.layers.").partition(".")
    return f"blk.{layer}.{_LAYER_NAMES[part]}.{suffix}"


def packaged_gguf(package: str) -> Path:
    """The GGUF file that an installed Python package carries; the package itself is not imported.

    Raises:
        ValueError: the package is not installed, or holds no or several ``.gguf`` files.
    """
    spec = find_spec(package)
    folders = [] if spec is None else spec.submodule_search_locations or []
    files = [file for folder in folders for file in sorted(Path(folder).glob("*.gguf"))]
    if len(files) != 1:
        state = "is not installed" if spec is None else f"holds {[file.name for file in files]}"
        raise ValueError(f"package {package}: {state}, accepted: an installed package with one .gguf file")
    return files[0]
