"""Weights of a GPTModel over tensor and pipeline ranks: from a Hugging Face directory, and to one."""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gapo_mega.engine.megatron.cpu import device
from gapo_mega.engine.megatron.modules import ValueModel
from gapo_mega.models import HFDirectory, ModelShape, WeightMap, families, write_hf

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
# Frequencies that old checkpoints stored; they follow from the configuration.
_DERIVED_TENSOR = ".rotary_emb.inv_freq"
_BACKBONE = "model."


def load_hf(model: GPTModel, shape: ModelShape, directory: str | Path) -> None:
    """Fill this rank's part of ``model`` from a Hugging Face directory. Not collective.

    Tensors are read one at a time and converted to the parameters' type. A ``ValueModel``'s head
    keeps its values, and the directory's output layer is left unread.

    Args:
        model: the bare model (not wrapped for training, whose fp32 copies would go stale).
        shape: the model's facts, as it was built with.
        directory: safetensors weights and ``config.json``.

    Raises:
        ValueError: the directory lacks a tensor, has one that the model does not use, or one of
            another shape than its configuration promises.
    """
    source = HFDirectory(directory)
    weights = _weight_map(model, shape)
    headless = isinstance(model, ValueModel)
    _check_names(source, weights, headless)
    rank = parallel_state.get_tensor_model_parallel_rank()
    with torch.no_grad():
        for name, parameter in _parameters(model).items():
            if headless and name.startswith("output_layer."):
                continue
            value = weights.to_megatron(name, source.read, rank)
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{source.path}: {', '.join(weights.sources(name))} give {name} the shape "
                    f"{list(value.shape)}, config.json promises {list(parameter.shape)}"
                )
            parameter.copy_(value)


def export_hf(
    model: GPTModel,
    shape: ModelShape,
    companions: str | Path,
    directory: str | Path,
    *,
    overwrite: bool = False,
) -> None:
    """Write ``model`` as a Hugging Face directory. Collective over all ranks; rank 0 writes.

    One parameter at a time travels to rank 0, so no rank holds more than its own part and one file's
    worth of tensors.

    Args:
        model: the bare language model, with its parameters up to date.
        shape: the model's facts, as it was built with.
        companions: directory whose configuration and tokenizer the new one gets.
        directory: what to write (on rank 0's file system); complete or absent.
        overwrite: replace ``directory`` where it exists.
    """
    assert not isinstance(model, ValueModel), "a critic has no Hugging Face form"
    if parallel_state.get_data_parallel_rank() == 0:
        tensors = _stream(model, _weight_map(model, shape))
        if dist.get_rank() == 0:
            write_hf(directory, companions, tensors, overwrite=overwrite)
        else:
            for _ in tensors:
                raise AssertionError("only rank 0 receives tensors")
    dist.barrier()


def _weight_map(model: GPTModel, shape: ModelShape) -> WeightMap:
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    return families()[shape.family].weight_map(shape, tensor, padded_vocab=model.vocab_size)


def _parameters(model: GPTModel) -> dict[str, Tensor]:
    """Parameters of this stage by the name that they have in the whole model."""

    def whole_model_name(name: str) -> str:
        local = _LAYER.match(name)
        if local is None:
            return name
        layer = model.decoder.layers[int(local.group(1))].layer_number - 1  # Megatron counts from 1
        return f"decoder.layers.{layer}.{name[local.end() :]}"

    return {whole_model_name(name): parameter for name, parameter in model.named_parameters()}


def _check_names(source: HFDirectory, weights: WeightMap, headless: bool) -> None:
    """Every tensor is there and used; the same answer on all ranks, whatever part they hold."""
    expected, found = weights.hf_names(), source.names
    if headless:
        expected = frozenset(name for name in expected if name.startswith(_BACKBONE))
        found = frozenset(name for name in found if name.startswith(_BACKBONE))
    missing = sorted(expected - found)
    if missing:
        raise ValueError(f"{source.path}: tensors missing: {_some(missing)}")
    unused = sorted(name for name in found - expected if not name.endswith(_DERIVED_TENSOR))
    if unused:
        raise ValueError(f"{source.path}: tensors that this model does not have: {_some(unused)}")


def _some(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


@dataclass(frozen=True)
class _Parcel:
    """A parameter that a pipeline stage sends: the shape and type of one tensor rank's part."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype


def _stream(model: GPTModel, weights: WeightMap) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors on rank 0; nothing on the other ranks, which must iterate too."""
    own = {name: value for name, value in _parameters(model).items() if not weights.is_copy(name)}
    pipeline = parallel_state.get_pipeline_model_parallel_group()
    stages: list[list[_Parcel]] = [[] for _ in range(pipeline.size())]
    parcels = [_Parcel(name, tuple(value.shape), value.dtype) for name, value in own.items()]
    dist.all_gather_object(stages, parcels, group=pipeline)
    seen: set[str] = set()
    for stage, parcels in enumerate(stages):
        for parcel in parcels:
            parts = _bring_to_first(own.get(parcel.name), parcel, stage, weights.tensor)
            if parts is not None:
                tensors = weights.to_hf(parcel.name, list(parts))
                seen.update(tensors)
                yield from tensors.items()
    if dist.get_rank() == 0:
        assert seen == weights.hf_names(), f"not exported: {sorted(weights.hf_names() - seen)}"


def _bring_to_first(value: Tensor | None, parcel: _Parcel, stage: int, tensor: int) -> Tensor | None:
    """All tensor ranks' parts ``[tensor, ...]`` of a parameter of ``stage`` on the replica's first rank.

    ``value`` is this rank's part, ``None`` off that stage. Gives ``None`` on all other ranks.
    """
    group = parallel_state.get_pipeline_model_parallel_group()
    is_first_column = parallel_state.get_tensor_model_parallel_rank() == 0
    parts = None if value is None else _gather_over_tensor(value.detach(), tensor)
    if stage == 0 or not is_first_column:
        return parts
    if group.rank() == stage:
        assert parts is not None
        dist.send(parts, group=group, group_dst=0)
        return None
    if group.rank() == 0:
        parts = torch.empty(tensor, *parcel.shape, dtype=parcel.dtype, device=device())
        dist.recv(parts, group=group, group_src=stage)
        return parts
    return None


def _gather_over_tensor(part: Tensor, tensor: int) -> Tensor | None:
    group = parallel_state.get_tensor_model_parallel_group()
    if group.rank() != 0:
        dist.gather(part.contiguous(), group=group, group_dst=0)
        return None
    parts = part.new_empty(tensor, *part.shape)
    dist.gather(part.contiguous(), list(parts), group=group, group_dst=0)
    return parts
