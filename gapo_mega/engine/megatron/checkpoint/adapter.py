"""Loads and writes the adapters of a model in PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel

from gapo_mega.config.lora import LoraConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.models.adapters import AdapterNames
from gapo_mega.models.casting import cast
from gapo_mega.models.huggingface.peft_adapter import PeftAdapter, write_adapter
from gapo_mega.models.shape import ModelShape


@torch.no_grad()
def load(chunks: Sequence[GPTModel], shape: ModelShape, lora: LoraConfig, directory: Path) -> None:
    """Fill this rank's adapters from a directory in PEFT's format. Not collective.

    Raises ``ValueError`` for an adapter that is another than ``lora`` says.
    """
    source = PeftAdapter(directory, lora)
    names = _names(shape, lora)
    source.check({names.source(name): names.size(name) for name in names.names()})
    rank = parallel_state.get_tensor_model_parallel_rank()
    for chunk in chunks:
        for name, parameter in weights.parameters_of(chunk).items():
            if names.has(name):
                value = source.read(names.source(name))
                where = f"model.lora.path: {directory}: {names.source(name)}"
                parameter.copy_(names.part_of(name, cast(value, parameter.dtype, where), rank))


def export(
    chunks: Sequence[GPTModel], shape: ModelShape, lora: LoraConfig, base: str, directory: Path
) -> None:
    """Write the adapters in PEFT's format. Collective over all ranks; rank 0 writes, and replaces.

    ``base``: the name or path of the model that they belong to.
    """
    names = _names(shape, lora)
    own = {name: value for chunk in chunks for name, value in weights.parameters_of(chunk).items()}
    tensors = dict(weights.stream(own, names, weights.parcels(own, names)))
    if dist.get_rank() == 0:
        assert tensors.keys() == {names.source(name) for name in names.names()}, "not all are exported"
        write_adapter(directory, lora, base, {name: value.cpu() for name, value in tensors.items()})
    dist.barrier()


def _names(shape: ModelShape, lora: LoraConfig) -> AdapterNames:
    return AdapterNames(shape, lora, parallel_state.get_tensor_model_parallel_world_size())
