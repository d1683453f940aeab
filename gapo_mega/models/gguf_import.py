"""GGUF files of the Llama architecture -> Hugging Face directories.

GGUF is llama.cpp's container: quantised weights, the tokenizer and the chat template in one file.
The ``gguf`` package reads and dequantises it, transformers builds the tokenizer from its metadata.
Two things are undone here: llama.cpp stores the rows of Q and K in the order of its own rotary
embedding, and transformers ignores how ``smollm`` vocabularies split digits.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from pathlib import Path

import gguf
import numpy as np
import torch
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

from gapo_mega.models.hf_writing import write_hf


def import_gguf(path: str | Path, directory: str | Path, *, overwrite: bool = False) -> None:
    """Convert a GGUF file to a Hugging Face directory with fp32 weights.

    Args:
        path: a ``.gguf`` file of the ``llama`` architecture with a ``smollm`` byte-level BPE tokenizer
            (the SmolLM and SmolLM2 models).
        directory: the directory to create; it appears only once complete.
        overwrite: replace ``directory`` where it exists already.

    Raises:
        ValueError: another architecture, tokenizer or rotary scaling; missing or unused tensors.
    """
    metadata = _Metadata(Path(path))
    config = _config(metadata)
    with tempfile.TemporaryDirectory() as companions:
        config.save_pretrained(companions)
        _generation_config(config).save_pretrained(companions)
        _save_tokenizer(metadata, config, companions)
        with torch.device("meta"):
            parameters = LlamaForCausalLM(config).named_parameters()
        promised = {name: parameter.to(torch.float32) for name, parameter in parameters}
        tensors = _tensors(metadata, config, promised)
        write_hf(directory, companions, promised, tensors, overwrite=overwrite)


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


class _Metadata:
    """The fields of a GGUF file, by key."""

    def __init__(self, path: Path) -> None:
        if not path.is_file():
            raise ValueError(f"GGUF file: {path} does not exist")
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except (ValueError, IndexError) as error:
            raise ValueError(f"GGUF file {path} cannot be read ({error}); accepted: a whole file") from error

    def get(self, key: str) -> object:
        """The value of ``key``, or ``None``."""
        field = self.reader.get_field(key)
        return None if field is None else field.contents()

    def integer(self, key: str) -> int:
        value = self.get(key)
        if not isinstance(value, int):
            raise ValueError(f"GGUF file {self.path}: {key} is {value!r}, accepted: an integer")
        return value

    def number(self, key: str) -> float:
        value = self.get(key)
        if not isinstance(value, float):
            raise ValueError(f"GGUF file {self.path}: {key} is {value!r}, accepted: a number")
        return float(str(np.float32(value)))  # stored in fp32: 1e-5 comes back as 9.9999997e-06

    def require(self, key: str, *accepted: object) -> None:
        value = self.get(key)
        if value not in accepted:
            raise ValueError(f"GGUF file {self.path}: {key} is {value!r}, accepted: {list(accepted)}")


def _config(metadata: _Metadata) -> LlamaConfig:
    metadata.require("general.architecture", "llama")
    metadata.require("llama.rope.scaling.type", None, "none")
    heads = metadata.integer("llama.attention.head_count")
    hidden = metadata.integer("llama.embedding_length")
    # llama.cpp rotates this many dimensions of a head; fewer than all is not a Llama model.
    metadata.require("llama.rope.dimension_count", None, hidden // heads)
    names = {tensor.name for tensor in metadata.reader.tensors}
    config = LlamaConfig(
        vocab_size=metadata.integer("llama.vocab_size"),
        hidden_size=hidden,
        intermediate_size=metadata.integer("llama.feed_forward_length"),
        num_hidden_layers=metadata.integer("llama.block_count"),
        num_attention_heads=heads,
        num_key_value_heads=metadata.integer("llama.attention.head_count_kv"),
        max_position_embeddings=metadata.integer("llama.context_length"),
        rms_norm_eps=metadata.number("llama.attention.layer_norm_rms_epsilon"),
        rope_parameters={"rope_type": "default", "rope_theta": metadata.number("llama.rope.freq_base")},
        tie_word_embeddings="output.weight" not in names,
        bos_token_id=metadata.integer("tokenizer.ggml.bos_token_id"),
        eos_token_id=metadata.integer("tokenizer.ggml.eos_token_id"),
        pad_token_id=metadata.integer("tokenizer.ggml.padding_token_id"),
    )
    config.architectures = ["LlamaForCausalLM"]
    config.dtype = torch.float32
    return config


def _generation_config(config: LlamaConfig) -> GenerationConfig:
    return GenerationConfig(  # type: ignore[no-untyped-call]
        bos_token_id=config.bos_token_id, eos_token_id=config.eos_token_id, pad_token_id=config.pad_token_id
    )


def _save_tokenizer(metadata: _Metadata, config: LlamaConfig, directory: str) -> None:
    metadata.require("tokenizer.ggml.model", "gpt2")
    metadata.require("tokenizer.ggml.pre", "smollm")
    tokenizer = AutoTokenizer.from_pretrained(metadata.path.parent, gguf_file=metadata.path.name)
    # "smollm" splits every digit off *before* the byte-level rule sees the text; without it the
    # spaces before a number merge differently from what the model was trained on.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Digits(individual_digits=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True),
        ]
    )
    tokenizer.model_max_length = config.max_position_embeddings
    tokenizer.save_pretrained(directory)


def _tensors(
    metadata: _Metadata, config: LlamaConfig, promised: Mapping[str, Tensor]
) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and fp32 tensors, one at a time."""
    tensors = {tensor.name: tensor for tensor in metadata.reader.tensors}
    name_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    heads_of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    for name, parameter in promised.items():
        stored = name_map.get_name(name, try_suffixes=(".weight",))
        if stored not in tensors:
            raise ValueError(f"GGUF file {metadata.path}: no tensor {stored} for {name}")
        source = tensors.pop(stored)
        tensor = torch.from_numpy(gguf.dequantize(source.data, source.tensor_type).astype(np.float32))
        heads = heads_of.get(name.split(".")[-2])
        if heads is not None:
            tensor = _rotate_half_order(tensor, heads)
        if tensor.shape != parameter.shape:
            raise ValueError(
                f"GGUF file {metadata.path}: {stored} has shape {list(tensor.shape)}, "
                f"its metadata promises {list(parameter.shape)}"
            )
        yield name, tensor
    if tensors:
        raise ValueError(
            f"GGUF file {metadata.path}: tensors that a Llama model does not have: {sorted(tensors)}"
        )


def _rotate_half_order(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's rotary layout (pairs 2i, 2i+1) to Hugging Face's (pairs i, i + d/2)."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1).contiguous()
