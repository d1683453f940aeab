"""Streaming conversion of whole checkpoints: Hugging Face directory <-> Megatron ``torch_dist``.

It builds no model and needs no parallel state. A checkpoint holds the tensors under the keys of Megatron's
sharded state dict, so that any layout loads it, with Megatron's own layers or Transformer Engine's. Its
folder ``hf/`` holds the configuration and the tokenizer that came with the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from tqdm import tqdm

from gapo_mega.engine.megatron.checkpoint.dist_format import (
    FORMAT,
    Chunk,
    DistReader,
    read_common,
    trained_model_prefix,
    write,
)
from gapo_mega.engine.megatron.checkpoint.failures import cause_in_words, first_cause
from gapo_mega.engine.megatron.checkpoint.weights import head_if_any
from gapo_mega.engine.megatron.model.build import padded_vocabulary
from gapo_mega.models import HFDirectory, adapters, shape_of, write_hf
from gapo_mega.models.casting import cast, dtype_name, is_finite
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.huggingface.location import COMPANIONS
from gapo_mega.models.huggingface.writing import (
    common_dtype,
    complete_or_absent,
    copy_companions,
    refuse_inside,
    set_config,
)
from gapo_mega.models.mapping import OUTPUT_LAYER, WeightMap
from gapo_mega.models.score_head import KEPT, OUTPUT_BIAS, ScoreHead, score_head_of, weight_map_of

logger = logging.getLogger(__name__)

# Where a checkpoint says which tensors it holds in a wider dtype than they had: name -> dtype.
_ORIGINAL_DTYPES = "original_dtypes"
# Megatron's linear layers load one object each, which is empty without FP8.
_EXTRA_STATES = ("self_attention.linear_qkv", "self_attention.linear_proj")
_EXTRA_STATES_OF_MLP = ("linear_fc1", "linear_fc2")


def to_checkpoint(
    source: Path,
    target: Path,
    *,
    tensor: int = 1,
    pipeline: int = 1,
    dtype: torch.dtype | None = None,
    overwrite: bool = False,
) -> None:
    """Write a Hugging Face directory as a Megatron checkpoint. Collective if torch.distributed is running.

    Args:
        source: language model or score model of a known family.
        target: the directory to create; it appears under its name only once it is complete.
        tensor, pipeline: the layout whose shards are stored as one piece each. Any other layout loads the
            result, too, with more reads. The processes share the writing by shards.
        dtype: the stored dtype; ``None`` keeps that of every tensor. Where tensors that are one in the
            checkpoint have several, it is one that holds them all exactly, and ``to_hf`` gives theirs back.
        overwrite: replace ``target`` if it exists.

    Raises:
        ValueError: Megatron cannot compute the model exactly, ``tensor`` or ``pipeline`` does not divide it,
            tensors are missing, left over, quantised or out of the range of ``dtype``, or writing ``target``
            fails.
    """
    refuse_inside(source, target)
    directory = HFDirectory(source)
    plan = _Plan(directory, tensor, pipeline, dtype)
    rank, world = (dist.get_rank(), dist.get_world_size()) if dist.is_initialized() else (0, 1)
    with _shared(target, overwrite, plan.num_bytes()) as folder:
        if rank == 0:
            copy_companions(source, folder / COMPANIONS)
            set_config(folder / COMPANIONS / "config.json", {}, plan.dtype())
        bar = tqdm(
            total=len(directory.names), desc=target.name, unit="tensor", disable=None if rank == 0 else True
        )
        with bar:
            chunks = list(plan.chunks(rank, world, bar.update))
            write(folder, chunks, plan.empty_objects() if rank == 0 else [], {"about": plan.about()})


def to_hf(source: Path, target: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False) -> None:
    """Write a Megatron checkpoint (converted, or of a training run) as a Hugging Face directory.

    From a training run's checkpoint it takes the trained model, the policy or the score model, with adapters
    merged into its weights.

    Args:
        source: the checkpoint's directory.
        target: the directory to create; it appears under its name only once it is complete.
        dtype: the written dtype; ``None`` keeps that of every stored tensor, or gives those of the directory
            back that the checkpoint was converted from.
        overwrite: replace ``target`` if it exists.

    Raises:
        ValueError: ``source`` is not a complete checkpoint or lacks tensors, a number is out of the range of
            ``dtype``, or writing ``target`` fails.
    """
    refuse_inside(source, target)
    reader = DistReader(source)
    about = read_common(source).get("about", {})
    companions = source / COMPANIONS
    if not (companions / "config.json").is_file():
        raise ValueError(
            f"checkpoint {source}: has no {COMPANIONS}/config.json; accepted: one written by gapo_mega"
        )
    config = read_config(companions)
    head = head_if_any(source)
    weights = weight_map_of(shape_of(config), head)
    prefix = trained_model_prefix(about)
    lora = adapters.from_settings(about.get("lora"))
    originals: dict[str, str] = about.get(_ORIGINAL_DTYPES, {})

    def typed(name: str, value: Tensor) -> Tensor:
        original = originals.get(name)
        wanted = dtype or (value.dtype if original is None else getattr(torch, original))
        return cast(value, wanted, f"{source}: {name}")

    promised = {
        hf_name: typed(hf_name, like)
        for name in weights.names()
        for hf_name, like in weights.to_hf(name, [_stored_like(reader, weights, prefix, name)]).items()
    }
    kept = {key.removeprefix(KEPT): key for key in sorted(reader.tensors) if key.startswith(KEPT)}
    for name, key in kept.items():
        promised[name] = torch.empty(
            reader.tensors[key].size, dtype=reader.tensors[key].properties.dtype, device="meta"
        )

    def adapter(name: str) -> Tensor:
        key, place = weights.checkpoint_key(name)
        return reader.read(prefix + key, place)

    def tensors() -> Iterator[tuple[str, Tensor]]:
        for name in weights.names():
            key, place = weights.checkpoint_key(name)
            whole = reader.read(prefix + key, place)
            if lora is not None:
                whole = adapters.merged(name, whole, weights.shape, lora, adapter)
            for hf_name, value in weights.to_hf(name, [whole]).items():
                yield hf_name, typed(hf_name, value)
        for name, key in kept.items():
            yield name, reader.read(key)

    bar = tqdm(tensors(), total=len(promised), desc=target.name, unit="tensor", disable=None)
    write_hf(target, companions, promised, bar, overwrite=overwrite)


def _stored_like(reader: DistReader, weights: WeightMap, prefix: str, name: str) -> Tensor:
    key, place = weights.checkpoint_key(name)
    stored = reader.tensors.get(prefix + key)
    if stored is None:
        raise ValueError(f"checkpoint {reader.path}: has no tensor {prefix + key}")
    return torch.empty(stored.size[len(place) :], dtype=stored.properties.dtype, device="meta")


class _Plan:
    """The chunks of a converted checkpoint, and which process writes which."""

    def __init__(self, source: HFDirectory, tensor: int, pipeline: int, dtype: torch.dtype | None) -> None:
        self._source = source
        self._shape = shape_of(source.config)
        self._head = score_head_of(source.config, source.names)
        self._tensor, self._pipeline, self._dtype = tensor, pipeline, dtype
        padded = padded_vocabulary(self._shape.vocab, tensor)
        self._weights = weight_map_of(self._shape, self._head, tensor, padded)
        if self._shape.num_layers % pipeline:
            raise ValueError(
                f"--pp: found {pipeline}, accepted: a divisor of the model's {self._shape.num_layers} layers"
            )
        beside = self._head.statistics if self._head else ()
        source.check_names(self._weights.hf_names(), beside, self._weights.copies)
        self._stored = self._stored_dtypes()

    def about(self) -> dict[str, Any]:
        """The checkpoint's description of itself: format, family of the weights, score head, lost dtypes."""
        head = asdict(self._head) if self._head is not None else None
        return {
            "format": FORMAT,
            "weights": self._shape.family,
            "score_head": head,
            _ORIGINAL_DTYPES: self._original_dtypes(),
        }

    def num_bytes(self) -> int:
        """Approximate size of the result."""
        return sum(
            self._source.like(source).numel() * self._stored[self._key(name)].itemsize
            for name in self._weights.names()
            for source in self._weights.sources(name)
        )

    def dtype(self) -> torch.dtype | None:
        """The one dtype of the result's tensors; ``None`` if they have several."""
        return self._dtype or common_dtype(self._source.like(name) for name in self._source.names)

    def empty_objects(self) -> list[str]:
        """Keys of the empty objects that Megatron's linear layers load."""
        layers, mlps = self._shape.num_layers, self._shape.mlps
        with_experts = self._shape.experts is not None
        found = []
        for layer in range(layers):
            at = f"_extra_state/shard_{layer}_{layers}"
            found += [f"decoder.layers.{module}.{at}" for module in _EXTRA_STATES]
            for module in _EXTRA_STATES_OF_MLP:
                if with_experts:
                    module = f"decoder.layers.mlp.experts.experts.{module}._extra_state/shard_{layer}"
                    found += [f"{module}.{expert}_{layers}.{mlps}" for expert in range(mlps)]
                else:
                    found.append(f"decoder.layers.mlp.{module}.{at}")
        return found

    def chunks(self, rank: int, world: int, done: Callable[[], Any]) -> Iterator[Chunk]:
        """The chunks of process ``rank`` of ``world``, which call ``done`` as their tensors are made."""
        for name in self._weights.names():
            copies = 1 if self._weights.kind(name) == "replicated" else self._weights.parts(name)
            for part in range(copies):
                if (self._stage(name) * self._tensor + part) % world == rank:
                    yield from self._parts(name, part, done)
        if self._head is not None and rank == 0:
            yield from self._of_head(self._head)

    def _parts(self, name: str, part: int, done: Callable[[], Any]) -> Iterator[Chunk]:
        """Tensor rank ``part``'s shard of a parameter: one chunk, or two for gate and up projection."""
        key, place = self._weights.checkpoint_key(name)
        kind = self._weights.kind(name)
        stored = self._stored[key]
        like = self._weights.to_megatron(name, self._source.like, part).to(stored)
        halves = like.chunk(2) if kind == "gated" else (like,)
        dim = 1 if kind == "columns" else 0
        pieces = 1 if kind == "replicated" else self._weights.parts(name)
        stacked = self._weights.stacked(name)
        single = (1,) * len(place)
        for half, piece in enumerate(halves):
            whole, offset = list(piece.shape), [0] * piece.dim()
            offset[dim] = (half * pieces + part) * whole[dim]
            whole[dim] *= pieces * len(halves)

            def make(half: int = half) -> Tensor:
                value = self._weights.to_megatron(name, self._source.read, part)
                sources = f"{self._source.path}: {', '.join(self._weights.sources(name))}"
                if not is_finite(value):
                    logger.warning("%s: NaN or infinite numbers, kept as they are", sources)
                value = cast(value, stored, sources)
                value = value.chunk(2)[half] if kind == "gated" else value
                done()
                return value.view(single + value.shape)

            yield Chunk(key, (*stacked, *whole), (*place, *offset), piece.view(single + piece.shape), make)

    def _of_head(self, head: ScoreHead) -> Iterator[Chunk]:
        for name in head.statistics:
            like = self._source.like(name)
            offset = (0,) * like.dim()
            yield Chunk(KEPT + name, tuple(like.shape), offset, like, partial(self._source.read, name))
        if head.bias is None:  # Megatron's head always has a bias
            like = torch.empty(1, dtype=self._stored[OUTPUT_LAYER], device="meta")
            yield Chunk(OUTPUT_BIAS, (1,), (0,), like, lambda: torch.zeros(1, dtype=like.dtype))

    def _stage(self, name: str) -> int:
        key, place = self._weights.checkpoint_key(name)
        if place:
            return place[0] * self._pipeline // self._shape.num_layers
        return 0 if key.startswith("embedding.") else self._pipeline - 1

    def _stored_dtypes(self) -> dict[str, torch.dtype]:
        """The dtype of every tensor of the checkpoint: without a wish, the least that loses nothing."""
        stored: dict[str, torch.dtype] = {}
        for name in self._weights.names():
            key = self._key(name)
            for source in self._weights.sources(name):
                found = self._dtype or self._source.like(source).dtype
                stored[key] = torch.promote_types(stored.get(key, found), found)
        return stored

    def _original_dtypes(self) -> dict[str, str]:
        """Dtypes of the source's tensors that are stored in a wider one, by their names."""
        if self._dtype is not None:
            return {}
        return {
            source: dtype_name(self._source.like(source).dtype)
            for name in self._weights.names()
            for source in self._weights.sources(name)
            if self._source.like(source).dtype != self._stored[self._key(name)]
        }

    def _key(self, name: str) -> str:
        key, _ = self._weights.checkpoint_key(name)
        return key


@contextmanager
def _shared(target: Path, overwrite: bool, needed_bytes: int) -> Iterator[Path]:
    """``complete_or_absent`` for all processes: rank 0 makes the directory, and all raise its refusal."""
    distributed = dist.is_initialized()
    with ExitStack() as stack:
        outcome: Any = None
        if not distributed or dist.get_rank() == 0:
            try:
                outcome = stack.enter_context(complete_or_absent(target, overwrite, needed_bytes))
            except ValueError as error:
                outcome = error
        if distributed:
            box = [outcome]
            dist.broadcast_object_list(box)
            (outcome,) = box
        if isinstance(outcome, ValueError):
            raise outcome
        try:
            yield outcome
        except CheckpointException as error:
            _, cause = first_cause(error)
            if isinstance(cause, ValueError):
                raise cause from error
            raise ValueError(f"{target} cannot be written ({cause_in_words(error)})") from error
    if distributed:
        dist.barrier()  # after it the directory has its final name on all ranks
