"""GGUF files -> Hugging Face directories.

The ``gguf`` package reads and dequantises the tensors. This file undoes one reordering: llama.cpp stores the
rows of Q and K of its ``llama`` architecture for a rotary embedding of neighbouring pairs. It leaves those of
the Qwen architectures as they are.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import gguf
import torch
from torch import Tensor
from transformers import PreTrainedConfig

from gapo_mega.models.gguf.config import (
    ARCHITECTURES,
    ROPE_FREQS,
    architecture,
    dequantized,
    generation_config,
    hf_config,
)
from gapo_mega.models.gguf.file import GGUFFile, shortened
from gapo_mega.models.gguf.tokenizer import save_tokenizer
from gapo_mega.models.huggingface.writing import refuse_inside, write_hf
from gapo_mega.scratch import TEMPORARY, scratch


def import_gguf(path: str | Path, directory: str | Path, *, overwrite: bool = False) -> None:
    """Convert a GGUF file to a Hugging Face directory with fp32 weights, tokenizer and chat template.

    Args:
        path: a ``.gguf`` file of the architecture ``llama`` (Llama, Mistral, SmolLM2), ``qwen2`` or ``qwen3``
            (dense), with a SentencePiece BPE vocabulary or a byte-level one of Llama 3, Qwen2 or SmolLM.
        directory: the directory to create; it appears only once complete.
        overwrite: replace ``directory`` where it exists already.

    Raises:
        ValueError: anything in the file that would not come out as the same model; nothing is written then.
    """
    file = GGUFFile(Path(path))
    refuse_inside(Path(path), Path(directory))
    config = hf_config(file)
    with torch.device("meta"):
        parameters = ARCHITECTURES[architecture(file)][1](config).named_parameters()
    promised = {name: parameter.to(torch.float32) for name, parameter in parameters}
    plan = _plan(file, config, promised)
    with scratch(Path(tempfile.gettempdir()), f"{TEMPORARY}gguf-") as (folder, _):
        companions = folder / "companions"
        config.save_pretrained(companions)
        generation_config(file, config).save_pretrained(companions)
        save_tokenizer(file, config, str(companions))
        write_hf(directory, companions, promised, _tensors(plan), overwrite=overwrite)


@dataclass(frozen=True)
class _Source:
    """Where a Hugging Face tensor comes from; ``heads``: their number if rows have llama.cpp's order."""

    name: str
    stored: gguf.ReaderTensor
    heads: int | None


def _plan(file: GGUFFile, config: PreTrainedConfig, promised: Mapping[str, Tensor]) -> list[_Source]:
    """Every parameter's source, of the right shape, with no tensor of the file left over."""
    kind = architecture(file)
    (key,) = (key for key, name in gguf.MODEL_ARCH_NAMES.items() if name == kind)
    name_map = gguf.get_tensor_name_map(key, config.num_hidden_layers)
    heads_of = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    unused = set(file.tensors) - ({ROPE_FREQS} if kind == "llama" else set())
    plan = []
    for name, parameter in promised.items():
        stored = name_map.get_name(name, try_suffixes=(".weight", ".bias"))
        if stored not in unused:
            raise ValueError(f"GGUF file {file.path}: no tensor {stored} for {name}")
        unused.remove(stored)
        _check_shape(file, stored, list(parameter.shape))
        rotary = heads_of.get(name.split(".")[-2]) if kind == "llama" else None
        plan.append(_Source(name, file.tensors[stored], rotary))
    if unused:
        raise ValueError(
            f"GGUF file {file.path}: tensors that a {kind} model does not have: {shortened(sorted(unused))}; "
            f"accepted: those of {ARCHITECTURES[kind][1].__name__}"
        )
    _check_quantisations(file, plan)
    return plan


def _check_shape(file: GGUFFile, stored: str, promised: list[int]) -> None:
    found = [int(size) for size in reversed(file.tensors[stored].shape)]
    if found != promised:
        raise ValueError(
            f"GGUF file {file.path}: {stored} has shape {found}, its metadata promises {promised}"
        )


def _check_quantisations(file: GGUFFile, plan: Iterable[_Source]) -> None:
    """Dequantise one row of each kind, to find out whether the ``gguf`` package supports that kind."""
    for kind, stored in {source.stored.tensor_type: source.stored for source in plan}.items():
        try:
            gguf.dequantize(stored.data[:1], kind)
        except NotImplementedError as error:
            raise ValueError(
                f"GGUF file {file.path}: {stored.name} is quantised as {kind.name}, accepted: what the gguf "
                "package dequantises (F32, F16, BF16, the Q and IQ kinds)"
            ) from error


def _tensors(plan: Iterable[_Source]) -> Iterator[tuple[str, Tensor]]:
    """Hugging Face names and fp32 tensors, one at a time."""
    for source in plan:
        tensor = dequantized(source.stored)
        yield source.name, tensor if source.heads is None else _rotate_half_order(tensor, source.heads)


def _rotate_half_order(weight: Tensor, heads: int) -> Tensor:
    """Rows from llama.cpp's rotary layout (pairs 2i, 2i+1) to Hugging Face's (pairs i, i + d/2)."""
    rows = weight.shape[0]
    return weight.reshape(heads, rows // heads // 2, 2, -1).transpose(1, 2).reshape(rows, -1).contiguous()
