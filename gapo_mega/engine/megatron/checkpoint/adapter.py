"""Loads and writes the adapters of a model in PEFT's format."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gapo_mega.config.lora import LoraConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.models.adapters import AdapterNames
from gapo_mega.models.casting import cast
from gapo_mega.models.huggingface.peft_adapter import PeftAdapter, write_adapter
from gapo_mega.models.mapping import OUTPUT_LAYER
from gapo_mega.models.score_head import ScoreHead
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
    chunks: Sequence[GPTModel],
    shape: ModelShape,
    lora: LoraConfig,
    base: str,
    directory: Path,
    head: ScoreHead | None = None,
) -> None:
    """Write the adapters in PEFT's format. Collective over all ranks; rank 0 writes, and replaces.

    ``base``: the name or path of the model that they belong to. ``head``: of a score model, written too.
    """
    names = _names(shape, lora) if head is None else _WithHead(shape, lora, _tensor_ranks(), head.weight)
    own = {name: value for chunk in chunks for name, value in weights.parameters_of(chunk).items()}
    tensors = dict(weights.stream(own, names, weights.parcels(own, names)))
    if dist.get_rank() == 0:
        assert tensors.keys() == {names.source(name) for name in names.names()}, "not all are exported"
        module = None if head is None else head.weight.removesuffix(".weight")
        write_adapter(directory, lora, base, {name: value.cpu() for name, value in tensors.items()}, module)
    dist.barrier()


class _WithHead(AdapterNames):
    """Also the head of a score model, which every tensor-parallel rank of the last stage has whole."""

    def __init__(self, shape: ModelShape, lora: LoraConfig, tensor: int, weight: str) -> None:
        super().__init__(shape, lora, tensor)
        self._weight = weight

    def names(self) -> list[str]:
        return [*super().names(), OUTPUT_LAYER]

    def has(self, name: str) -> bool:
        return name == OUTPUT_LAYER or super().has(name)

    def source(self, name: str) -> str:
        return f"base_model.model.{self._weight}" if name == OUTPUT_LAYER else super().source(name)

    def to_hf(self, name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        return {self.source(name): parts[0]} if name == OUTPUT_LAYER else super().to_hf(name, parts)


def _names(shape: ModelShape, lora: LoraConfig) -> AdapterNames:
    return AdapterNames(shape, lora, _tensor_ranks())


def _tensor_ranks() -> int:
    return int(parallel_state.get_tensor_model_parallel_world_size())
