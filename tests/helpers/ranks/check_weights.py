"""A model loaded in one layout: its logits against transformers', and its export bit by bit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from megatron.core import tensor_parallel
from megatron.core.models.gpt import GPTModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.model import build, forward
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.types import TokenBatch
from tests.helpers.ranks import worlds


def logits_of(chunks: Sequence[GPTModel], tokens_BT: Tensor, vocabulary: int) -> Tensor | None:
    """Whole logits [B, T, V] in fp32 on the last pipeline stage, ``None`` elsewhere."""

    def whole(output: Tensor, _: TokenBatch) -> Tensor:
        gathered = tensor_parallel.gather_from_tensor_model_parallel_region(output)
        return gathered[..., :vocabulary].float().cpu()

    batch = TokenBatch(tokens_BT, torch.ones(tokens_BT.shape, dtype=torch.bool))
    with megatron_device():
        collected = forward.forward_only([model.eval() for model in chunks], [batch], whole)
    return collected[0] if collected else None


def run(arguments: dict[str, Any]) -> dict[str, Any]:
    """``arguments``: model, weights, export (folders), layout, dtype, tokens of the checked sequences.

    ``weights`` is the model itself, or a checkpoint that it was converted to.

    Gives ``logit_error``, the greatest difference over the greatest logit, and ``different``, the
    names of exported tensors that do not equal the originals bit by bit.
    """
    layout = ParallelConfig.model_validate(arguments["layout"])
    return _check(arguments, layout, worlds.enter_layout(layout))


def _check(arguments: dict[str, Any], layout: ParallelConfig, world: groups.Groups) -> dict[str, Any]:
    directory, export = Path(arguments["model"]), Path(arguments["export"])
    shape = shape_of(HFDirectory(directory).config)
    config = ModelConfig.model_validate({"path": str(directory), "dtype": arguments["dtype"]})
    with megatron_device():
        chunks = build.build_chunks(shape, config, layout)
        for chunk in chunks:
            weights.load(chunk, shape, Path(arguments["weights"]))
        weights.export_hf(chunks, shape, directory, export)

    tokens_BT = torch.randint(
        0, shape.vocab, (2, arguments["tokens"]), generator=torch.Generator().manual_seed(1)
    )
    with torch.no_grad():
        expected_BTV = AutoModelForCausalLM.from_pretrained(directory).float().eval()(tokens_BT).logits
    found_BTV = logits_of(chunks, tokens_BT, shape.vocab)
    found_BTV = world.from_last_stage(torch.zeros_like(expected_BTV) if found_BTV is None else found_BTV)
    return {
        "logit_error": float((found_BTV - expected_BTV).abs().max() / expected_BTV.abs().max()),
        "different": compare(directory, export, chunks[0].config.params_dtype),
    }


def compare(directory: Path, export: Path, dtype: torch.dtype) -> list[str]:
    """Names of tensors that are missing, too many, or not bit-equal after rounding to ``dtype``."""
    expected = load_file(directory / "model.safetensors")
    found = load_file(export / "model.safetensors")
    return sorted(
        name
        for name in expected.keys() | found.keys()
        if name not in expected or name not in found or not torch.equal(expected[name].to(dtype), found[name])
    )
