"""Loads and exports the weights of a GPTModel that is sharded over tensor and pipeline ranks."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Protocol

import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state
from megatron.core.dist_checkpointing.core import CheckpointingException
from megatron.core.dist_checkpointing.utils import add_prefix_for_sharding
from megatron.core.models.gpt import GPTModel
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException

from gapo_mega.engine.megatron.checkpoint import model_state
from gapo_mega.engine.megatron.checkpoint.dist_format import is_checkpoint, read_common, trained_model_prefix
from gapo_mega.engine.megatron.checkpoint.failures import cause_in_words
from gapo_mega.engine.megatron.model import lora
from gapo_mega.engine.megatron.model.modules import ValueModel
from gapo_mega.engine.megatron.runtime import releases
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.models import HFDirectory, ModelShape, WeightMap, write_hf
from gapo_mega.models.adapters import from_settings
from gapo_mega.models.casting import cast, is_finite
from gapo_mega.models.mapping import is_expert
from gapo_mega.models.score_head import OUTPUT_BIAS, ScoreHead, score_head_of, weight_map_of

_LAYER = re.compile(r"^decoder\.layers\.(\d+)\.")
_EXPERT = re.compile(r"^(mlp\.experts\.local_experts\.)(\d+)")
_BACKBONE = "model."
# What other models may have in the place of a critic's head; it is not read.
_HEADS = ("lm_head.", "score.", "score_head.", "normalizer.", "v_head.", "value_head.")


def head_if_any(source: Path) -> ScoreHead | None:
    """The score head of a Hugging Face directory or checkpoint; ``None`` for a language model."""
    if is_checkpoint(source):
        stored = read_common(source).get("about", {}).get("score_head")
        return ScoreHead(**stored) if stored else None
    directory = HFDirectory(source)
    return score_head_of(directory.config, directory.names)


def load(model: GPTModel, shape: ModelShape, source: Path, head: ScoreHead | None = None) -> None:
    """Fill this rank's part of ``model`` from a Hugging Face directory or a Megatron checkpoint.

    Collective if ``source`` is a checkpoint. Without ``head``, a ``ValueModel``'s head keeps its values, and
    this does not read the source's output layer.

    Args:
        model: the bare model, not yet wrapped for training: fp32 copies of its parameters would go stale.
        shape: the shape that ``model`` was built with; a directory may have more layers.
        source: a directory with weights and ``config.json``, or a checkpoint that this package wrote. From a
            training run's checkpoint this loads the trained model, its adapters merged into the weights.
        head: the score head of ``source``, if it has one.

    Raises:
        ValueError: the source lacks a tensor, has one that the model does not use, or has one whose shape
            differs from its configuration.
    """
    if is_checkpoint(source):
        _load_checkpoint(
            model, shape, source, with_head=head is not None or not isinstance(model, ValueModel)
        )
    else:
        load_hf(model, shape, source, head)


def load_hf(model: GPTModel, shape: ModelShape, directory: str | Path, head: ScoreHead | None = None) -> None:
    """Load from a Hugging Face directory as ``load`` does, one tensor at a time. Not collective."""
    source = HFDirectory(directory)
    weights = _weight_map(model, shape, head)
    headless = isinstance(model, ValueModel) and head is None
    whole = replace(shape, num_layers=max(shape.num_layers, source.config.num_hidden_layers))
    _check_names(source, weights, head, headless, _weight_map(model, whole, head).hf_names())
    with torch.no_grad():
        for name, parameter in parameters_of(model).items():
            if name.startswith("output_layer.") and headless:
                continue
            if name == OUTPUT_BIAS and head is not None and head.bias is None:
                continue  # stays 0
            value = weights.to_megatron(name, source.read, _part_of(name))
            if value.shape != parameter.shape:
                raise ValueError(
                    f"{source.path}: {', '.join(weights.sources(name))} give {name} the shape "
                    f"{list(value.shape)}, config.json promises {list(parameter.shape)}"
                )
            parameter.copy_(_checked(source, weights.sources(name), value, parameter.dtype))


def _checked(source: HFDirectory, names: Sequence[str], value: Tensor, dtype: torch.dtype) -> Tensor:
    """``value``, made of the tensors ``names``, in the model's type. No NaN and nothing infinite."""
    if is_finite(value):
        return cast(value, dtype, f"model.dtype: {source.path}: {', '.join(names)}")
    broken = [name for name in names if not is_finite(source.read(name))]
    raise ValueError(
        f"{source.path}: {', '.join(broken)} holds NaN or infinite numbers; accepted: finite weights"
    )


def _load_checkpoint(model: GPTModel, shape: ModelShape, directory: Path, with_head: bool) -> None:
    about = read_common(directory).get("about", {})
    if about.get("score_head") and not isinstance(model, ValueModel):
        # With tied embeddings no missing tensor would give it away.
        raise ValueError(f"checkpoint {directory}: found a score model, accepted: a language model")
    prefix = trained_model_prefix(about)
    adapters = from_settings(about.get("lora"))
    if adapters is not None:
        lora.add(model, shape, adapters)
    left = () if with_head else ("output_layer.",)
    entries = model_state.to_load(model_state.to_save(model))
    state = {name: entry for name, entry in entries.items() if not name.startswith(left)}
    add_prefix_for_sharding(state, prefix)
    try:
        with releases.without_advice():
            loaded = dist_checkpointing.load(state, str(directory), validate_access_integrity=False)
    except CheckpointException as error:
        reason = cause_in_words(error)
        raise ValueError(f"checkpoint {directory} cannot be loaded as this model ({reason})") from error
    except (CheckpointingException, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ValueError(f"checkpoint {directory} cannot be loaded as this model: {reason}") from error
    for name in state:
        if isinstance(found := loaded[name], Tensor) and not is_finite(found):
            raise ValueError(
                f"checkpoint {directory}: {prefix}{name} holds NaN or infinite numbers, as stored or in the "
                "range of model.dtype; accepted: finite weights"
            )
    # Megatron also returns entries that ``state`` does not ask for, such as "about".
    model_state.restore(model, {name: loaded[name] for name in state}, left)
    if adapters is not None:
        lora.merge(model)


def export_hf(
    chunks: Sequence[GPTModel],
    shape: ModelShape,
    companions: str | Path,
    directory: str | Path,
    *,
    head: ScoreHead | None = None,
    config: Mapping[str, object] | None = None,
    overwrite: bool = False,
) -> None:
    """Write a model as a Hugging Face directory. Collective over all ranks; rank 0 writes.

    Parameters travel to rank 0 one at a time, so no rank holds more than its own shard and one tensor.

    Args:
        chunks: this rank's bare chunks (``build_chunks``), with their parameters up to date.
        shape: the shape that they were built with.
        companions: directory to copy configuration and tokenizer from.
        directory: the directory to write on rank 0's file system; it ends up complete or absent.
        head: names of a score model's head; a bias without a name is not written.
        config: entries of ``config.json`` that differ from the companions'.
        overwrite: replace ``directory`` if it exists.
    """
    assert isinstance(chunks[0], ValueModel) == (head is not None), "a critic has no Hugging Face form"
    weights, own, sent = _to_send(chunks, shape, head)
    promised = {
        name: like
        for parcel in sent
        for name, like in weights.to_hf(parcel.name, [parcel.like()] * len(parcel.senders)).items()
    }
    tensors = stream(own, weights, sent, _whole(chunks))
    if dist.get_rank() == 0:
        assert promised.keys() == weights.hf_names(), "not all tensors are exported"
        write_hf(directory, companions, promised, tensors, config=config, overwrite=overwrite)
    else:
        for _ in tensors:
            raise AssertionError("only rank 0 receives tensors")
    dist.barrier()


def hf_stream(chunks: Sequence[GPTModel], shape: ModelShape) -> Iterator[tuple[str, Tensor]]:
    """A language model's tensors under their Hugging Face names, one parameter after another.

    Collective over all ranks, which must all iterate to the end. Whole tensors on rank 0, adapters merged in;
    none elsewhere. No rank holds more than its own shard and one tensor.
    """
    weights, own, sent = _to_send(chunks, shape, None)
    yield from stream(own, weights, sent, _whole(chunks))


def _to_send(
    chunks: Sequence[GPTModel], shape: ModelShape, head: ScoreHead | None
) -> tuple[WeightMap, dict[str, Tensor], list[Parcel]]:
    """The names of a model's tensors, this rank's parameters, and what goes to rank 0. Collective."""
    weights = _weight_map(chunks[0], shape, head)
    own = {name: value for chunk in chunks for name, value in parameters_of(chunk).items()}
    return weights, own, parcels(own, weights)


def _whole(chunks: Sequence[GPTModel]) -> Callable[[Tensor], Tensor]:
    """What of a parameter is exported: with its adapter, if it has one."""
    adapted = {layer.linear.weight: layer for layer in lora.adapted_layers(chunks)}
    return lambda value: adapted[value].merged() if value in adapted else value.detach()


def _weight_map(model: GPTModel, shape: ModelShape, head: ScoreHead | None = None) -> WeightMap:
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    expert_tensor = parallel_state.get_expert_tensor_parallel_world_size()
    return weight_map_of(shape, head, tensor, padded_vocab=model.vocab_size, expert_tensor=expert_tensor)


def _part_of(name: str) -> int:
    """This rank's number among those that share a parameter."""
    if is_expert(name):
        return int(parallel_state.get_expert_tensor_parallel_rank())
    return int(parallel_state.get_tensor_model_parallel_rank())


def parameters_of(model: GPTModel) -> dict[str, Tensor]:
    """A chunk's parameters by their names in the whole model."""

    def whole_model_name(name: str) -> str:
        local = _LAYER.match(name)
        if local is None:
            return name
        layer = model.decoder.layers[int(local.group(1))]
        rest = name[local.end() :]
        expert = _EXPERT.match(rest)
        if expert is not None:
            number = layer.mlp.local_expert_indices[int(expert.group(2))]
            rest = f"{expert.group(1)}{number}{rest[expert.end() :]}"
        return f"decoder.layers.{layer.layer_number - 1}.{rest}"  # Megatron counts from 1

    return {whole_model_name(name): parameter for name, parameter in model.named_parameters()}


def _check_names(
    source: HFDirectory,
    weights: WeightMap,
    head: ScoreHead | None,
    headless: bool,
    whole: frozenset[str],
) -> None:
    """Check that every tensor exists and is used; all ranks, whatever their part, come to the same answer.

    ``whole``: tensors of the source's model, which may have more layers than ours.
    """
    expected = weights.hf_names()
    beside = set(head.statistics) if head is not None else set()
    if headless:
        expected = frozenset(name for name in expected if name.startswith(_BACKBONE))
        beside = {name for name in source.names if name.startswith(_HEADS)}
    source.check_names(expected, beside, weights.copies, whole)


@dataclass(frozen=True)
class Parcel:
    """A parameter that goes to rank 0: shape and dtype of a part, and the ranks that send the parts."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    senders: tuple[int, ...]

    def like(self) -> Tensor:
        """A meta tensor of a part's shape and dtype."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")


class Naming(Protocol):
    """What an export asks of the names of a model's parameters."""

    def has(self, name: str) -> bool:
        """Whether the parameter is exported."""
        ...

    def is_copy(self, name: str) -> bool:
        """Whether another stage has the same parameter."""
        ...

    def parts(self, name: str) -> int:
        """Ranks that share the parameter."""
        ...

    def to_hf(self, name: str, parts: Sequence[Tensor]) -> dict[str, Tensor]:
        """Whole tensors by their names in the file, from all parts."""
        ...


def _sends(name: str) -> bool:
    """Whether this rank is the one of those with the same part of a parameter that sends it."""
    if is_expert(name):
        return bool(parallel_state.get_expert_data_parallel_rank() == 0)
    return bool(parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0)


def parcels(own: Mapping[str, Tensor], weights: Naming) -> list[Parcel]:
    """What goes to rank 0, the same on all ranks, by an all-gather."""
    mine = {
        name: (_part_of(name), tuple(value.shape), value.dtype)
        for name, value in own.items()
        if _sends(name) and not weights.is_copy(name) and weights.has(name)
    }
    held: list[dict[str, tuple[int, tuple[int, ...], torch.dtype]]] = [
        {} for _ in range(dist.get_world_size())
    ]
    dist.all_gather_object(held, mine)
    senders: dict[str, dict[int, int]] = {}
    likes: dict[str, tuple[tuple[int, ...], torch.dtype]] = {}
    for rank, names in enumerate(held):
        for name, (part, shape, dtype) in names.items():
            senders.setdefault(name, {})[part] = rank
            likes[name] = shape, dtype
    return [
        Parcel(name, *likes[name], tuple(ranks[part] for part in range(weights.parts(name))))
        for name, ranks in senders.items()
    ]


def stream(
    own: Mapping[str, Tensor],
    weights: Naming,
    parcels: Sequence[Parcel],
    sent: Callable[[Tensor], Tensor] = Tensor.detach,
) -> Iterator[tuple[str, Tensor]]:
    """Whole Hugging Face tensors on rank 0; the other ranks get none but must iterate, too.

    ``sent``: what of a rank's own parameter is exported, of the same shape and dtype.
    """
    rank = dist.get_rank()
    for parcel in parcels:
        if rank == 0:
            parts = [
                sent(own[parcel.name]) if sender == 0 else _receive(parcel, sender)
                for sender in parcel.senders
            ]
            yield from weights.to_hf(parcel.name, parts).items()
        elif rank in parcel.senders:
            dist.send(sent(own[parcel.name]).contiguous(), dst=0)


def _receive(parcel: Parcel, sender: int) -> Tensor:
    part = torch.empty(parcel.shape, dtype=parcel.dtype, device=device())
    dist.recv(part, src=sender)
    return part
