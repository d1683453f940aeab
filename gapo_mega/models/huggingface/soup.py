"""Merges models of one architecture: every tensor is the weighted sum of the models' own.

Rewarded Soups (arXiv 2306.04488) takes weights on the simplex for models trained from one initialisation.
Task arithmetic (arXiv 2212.04089), ``base + sum_i l_i (model_i - base)``, is the same sum with the weight
``1 - sum_i l_i`` for the base.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import PreTrainedTokenizerBase

from gapo_mega.models.casting import cast, dtype_name
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.directory import HFDirectory
from gapo_mega.models.huggingface.token_ids import has_tokenizer
from gapo_mega.models.huggingface.tokenizer import read_tokenizer
from gapo_mega.models.huggingface.writing import write_hf

logger = logging.getLogger(__name__)

_CHUNK = 1 << 20  # elements that are summed together: their float64 copies stay small
_TIED = {"lm_head.weight": "model.embed_tokens.weight"}  # copies that a directory of a tied model may hold
# Fields that do not change what a model computes.
_FREE = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache")
# Of a fast tokenizer, what does not change how a text becomes ids.
_STATE = ("padding", "truncation")


def write_soup(
    sources: Sequence[Path],
    weights: Sequence[float],
    target: Path,
    *,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write ``sum_i weights_i model_i`` as a Hugging Face directory, one tensor in memory at a time.

    Sums are float64, rounded at the end. A model of weight 0 is checked and not read, and the only model with
    a weight other than 0, if that is 1, is copied bit for bit.

    Args:
        sources: directories of models that differ in their weights only. The first gives configuration,
            tokenizer and everything else that lies beside the weights.
        dtype: of all tensors; None: as the models store them.

    Raises:
        ValueError: the models' configurations, tokenizers, tensors, shapes or (without ``dtype``) types
            differ, a sum is beyond its type, or ``target`` cannot be written. Nothing is left behind.
    """
    models = check_alike(sources, dtype)
    first = models[0]
    names = _names(first)
    promised = {name: first.like(name) if dtype is None else first.like(name).to(dtype) for name in names}

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name, like in promised.items():
            yield name, _sum_of(models, weights, name, like.dtype)

    bar = tqdm(tensors(), total=len(promised), desc=target.name, unit="tensor", disable=None)
    write_hf(target, first.path, promised, bar, overwrite=overwrite)


def check_alike(sources: Sequence[Path], dtype: torch.dtype | None = None) -> list[HFDirectory]:
    """Open the directories; ``ValueError`` unless they can be merged. Reads headers of weights only."""
    _check_configurations(sources)
    _check_tokenizers(sources)
    models = [_opened(source) for source in sources]
    first, *others = models
    names = _names(first)
    tied = _TIED if first.config.tie_word_embeddings else {}
    for model in models:
        model.check_names(frozenset(names), copies=tied)
    for model in others:
        for name in names:
            mine, wanted = model.like(name), first.like(name)
            if mine.shape != wanted.shape:
                raise ValueError(
                    f"--model: {name} of {model.path} has the shape {list(mine.shape)}, accepted: "
                    f"{list(wanted.shape)}, that of {first.path}"
                )
            if dtype is None and mine.dtype != wanted.dtype:
                raise ValueError(
                    f"--dtype: found none, but {name} is {dtype_name(wanted.dtype)} in {first.path} and "
                    f"{dtype_name(mine.dtype)} in {model.path}; accepted: fp32, bf16 or fp16"
                )
    return models


def _opened(source: Path) -> HFDirectory:
    try:
        return HFDirectory(source)
    except ValueError as error:  # who reads models knows no name but model.path
        raise ValueError(f"--model: {str(error).removeprefix('model.path: ')}") from error


def _names(model: HFDirectory) -> list[str]:
    tied = _TIED if model.config.tie_word_embeddings else {}
    return [name for name in model.weights if name not in tied]


def _sum_of(models: Sequence[HFDirectory], weights: Sequence[float], name: str, dtype: torch.dtype) -> Tensor:
    """One tensor of the merged model."""
    terms = [(model, weight) for model, weight in zip(models, weights, strict=True) if weight]
    assert terms, "weights sum to 1"
    if len(terms) == 1 and terms[0][1] == 1:
        model = terms[0][0]
        return cast(model.read(name), dtype, f"{model.path}: {name}")
    read = [(model.read(name).contiguous().view(-1), weight) for model, weight in terms]
    result = torch.empty(models[0].like(name).shape, dtype=dtype)
    flat = result.view(-1)
    for start in range(0, len(flat), _CHUNK):
        part = slice(start, start + _CHUNK)
        total = torch.zeros_like(flat[part], dtype=torch.float64)
        for tensor, weight in read:
            total.add_(tensor[part].double(), alpha=weight)
        flat[part] = cast(total, dtype, f"--weights: the sum of {name}")
    return result


def _check_configurations(sources: Sequence[Path]) -> None:
    first, *others = (_configuration(source) for source in sources)
    for source, found in zip(sources[1:], others, strict=True):
        for key in sorted(first.keys() | found.keys()):
            if first.get(key) != found.get(key):
                raise ValueError(
                    f"--model: {source / 'config.json'} has {key} {_shown(found.get(key))}, accepted: "
                    f"{_shown(first.get(key))}, as in {sources[0]}"
                )


def _configuration(source: Path) -> Mapping[str, Any]:
    """Every field that counts, defaults included: one directory may write down what another leaves out."""
    fields = read_config(source, "--model").to_dict()
    return {key: value for key, value in fields.items() if key not in _FREE}


def _check_tokenizers(sources: Sequence[Path]) -> None:
    """Of the models that have one; the first model's goes with the result."""
    having = [source for source in sources if has_tokenizer(source)]
    tokenizers = [read_tokenizer(source, "--model") for source in having]
    for source, tokenizer in zip(having[1:], tokenizers[1:], strict=True):
        different = _difference(tokenizers[0], tokenizer)
        if different is not None:
            raise ValueError(
                f"--model: the tokenizer of {source} has {different} than that of {having[0]}, accepted: "
                "models with one tokenizer"
            )
        if tokenizer.chat_template != tokenizers[0].chat_template:
            logger.warning("%s has another chat template than %s, whose is taken", source, having[0])


def _difference(one: PreTrainedTokenizerBase, other: PreTrainedTokenizerBase) -> str | None:
    if one.get_vocab() != other.get_vocab():
        changed = sorted(set(one.get_vocab().items()) ^ set(other.get_vocab().items()))
        return f"other tokens (such as {changed[0][0]!r}, {changed[0][1]})"
    if one.special_tokens_map != other.special_tokens_map:
        return f"other special tokens ({_shown(other.special_tokens_map)})"
    if one.is_fast and other.is_fast and _rules(one) != _rules(other):
        return "other rules of splitting texts"
    return None


def _rules(tokenizer: PreTrainedTokenizerBase) -> Mapping[str, Any]:
    rules: dict[str, Any] = json.loads(tokenizer.backend_tokenizer.to_str())
    return {key: value for key, value in rules.items() if key not in _STATE}


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else text[:77] + "..."
