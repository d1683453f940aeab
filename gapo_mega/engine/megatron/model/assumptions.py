"""What the engine assumes of Megatron-core's buffers, groups and attributes, checked once at start.

The engine reads and writes Megatron's own buffers. Where a release lays them out in another way, the start
ends in one line that names the assumption, instead of a training on wrong gradients. The comparison of norms
in ``gradients/update.py`` is the last guard.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel, DistributedDataParallelConfig
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from megatron.core.tensor_parallel import (
    ColumnParallelLinear,
    RowParallelLinear,
    VocabParallelEmbedding,
    param_is_not_tensor_parallel_duplicate,
)
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from gapo_mega.engine.megatron.model import gathering
from gapo_mega.engine.megatron.model.assumed import generation_finds_cache_and_switches, require, wrong
from gapo_mega.engine.megatron.model.buffers import (
    buffers_of,
    data_group_of,
    kinds_of,
    numbered,
    optimizer_instances,
    shard_group_of,
)
from gapo_mega.engine.megatron.model.lora import LowRank
from gapo_mega.engine.megatron.model.main_parameters import main_parameters, owned_parts
from gapo_mega.engine.megatron.model.modules import RMSNorm, ValueHead
from gapo_mega.engine.megatron.model.reduction import is_summed_over_tensor_ranks, without_overlap

_PIECE = 1 << 22  # elements
_STEPS = ("zero_grad", "prepare_grads", "get_grad_norm", "step")
_UNREADABLE = (AttributeError, IndexError, KeyError, TypeError, ValueError)


def check(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    """Check every assumption on a wrapped model and its optimizer. Collective: reduces one gradient of ones.

    ``chunks``: this rank's part of the model; several where the pipeline is interleaved.
    Leaves the gradient buffer zero. Raises ``RuntimeError`` that names the release and the first assumption
    that does not hold.
    """
    try:
        for chunk in chunks:
            _buffers_hold_the_gradients(chunk)
            _buckets_are_reduced_over_the_data_ranks(chunk, chunks[0].ddp_config)
            generation_finds_cache_and_switches(chunk)
        _one_optimizer_with_its_group(chunks, optimizer)
        _optimizer_steps_what_this_rank_owns(chunks, optimizer)
        _marks_tell_who_counts(chunks, optimizer)
        _reduction_sums_in_place(chunks)
        _gathering_brings_what_others_step(chunks)
    except _UNREADABLE as error:
        raise wrong("what the engine reads of Megatron's objects has its name and form", error) from error


# -- buffers -----------------------------------------------------------------------------------------
def _buffers_hold_the_gradients(model: DistributedDataParallel) -> None:
    names = {parameter: name for name, parameter in model.named_parameters() if parameter.requires_grad}
    require(
        model.config.expert_model_parallel_size > 1 or not model.expert_parallel_buffers,
        "no parameter is an expert's without expert parallelism",
        "expert_parallel_buffers",
    )
    held = [parameter for buffer in buffers_of(model) for parameter in buffer.param_index_map]
    require(
        len(held) == len(names) and set(held) == set(names),
        "every trainable parameter lies in exactly one of the model's buffers",
        f"{len(held)} entries of param_index_map for {len(names)} parameters",
    )
    require(
        set(model.params_with_grad) == set(names),
        "params_with_grad are the trainable parameters",
        f"{len(model.params_with_grad)} for {len(names)}",
    )
    for buffer in buffers_of(model):
        data = buffer.grad_data
        require(
            data.dim() == 1 and data.is_contiguous() and data.dtype == torch.float32,
            "buffer.grad_data is one flat fp32 tensor",
            f"{data.dtype} of shape {list(data.shape)}",
        )
        for bucket in buffer.buckets:
            require(
                _is_part(bucket.grad_data, data, bucket.offset),
                "bucket.grad_data is the part of buffer.grad_data that begins at bucket.offset",
                f"other memory at offset {bucket.offset}",
            )
        _parameters_lie_in_their_buckets(buffer, names)


def _parameters_lie_in_their_buckets(buffer: object, names: dict[nn.Parameter, str]) -> None:
    filled = 0
    spans = sorted(buffer.param_index_map.items(), key=lambda item: item[1][:2])  # type: ignore[attr-defined]
    for parameter, (first, last, number) in spans:
        name = names[parameter]
        bucket = buffer.buckets[number]  # type: ignore[attr-defined]
        require(
            filled <= first and last - first == parameter.numel(),
            "buffer.param_index_map has each parameter's own [start, end)",
            f"[{first}, {last}) for {name} of {parameter.numel()} elements, after one that ends at {filled}",
        )
        filled = last
        require(
            bucket.offset <= first and last <= bucket.offset + bucket.grad_data.numel(),
            "buffer.param_index_map names the bucket that a parameter lies in",
            f"bucket {number} for {name}",
        )
        require(
            parameter.main_grad.shape == parameter.shape
            and _is_part(parameter.main_grad, buffer.grad_data, first),  # type: ignore[attr-defined]
            "parameter.main_grad is the part of buffer.grad_data that param_index_map names",
            f"other memory for {name}",
        )
        require(
            parameter.grad_added_to_main_grad is False,
            "parameter.grad_added_to_main_grad begins as False",
            f"{parameter.grad_added_to_main_grad} for {name}",
        )


def _is_part(part: Tensor, whole: Tensor, offset: int) -> bool:
    """Whether ``part`` is the memory of flat ``whole`` from element ``offset`` on."""
    begin = whole.data_ptr() + offset * whole.element_size()
    inside = offset >= 0 and offset + part.numel() <= whole.numel()
    return inside and part.is_contiguous() and part.dtype == whole.dtype and part.data_ptr() == begin


# -- groups ------------------------------------------------------------------------------------------
def _ranks(group: dist.ProcessGroup | None) -> list[int] | None:
    return None if group is None else sorted(dist.get_process_group_ranks(group))


def _buckets_are_reduced_over_the_data_ranks(
    model: DistributedDataParallel, config: DistributedDataParallelConfig
) -> None:
    for kind, buffers in enumerate(kinds_of(model)):
        groups = (model.bucket_groups, model.expert_parallel_bucket_groups)[kind]
        _groups_are_reduced_over(shard_group_of(kind), groups, buffers, model.ddp_config is config, config)


def _groups_are_reduced_over(
    data_group: dist.ProcessGroup,
    groups: Sequence[Any],
    buffers: Sequence[Any],
    shares_config: bool,
    config: DistributedDataParallelConfig,
) -> None:
    grouped = [id(bucket) for group in groups for bucket in group.buckets]
    held = [id(bucket) for buffer in buffers for bucket in buffer.buckets]
    require(sorted(grouped) == sorted(held), "every bucket is in one of bucket_groups", len(grouped))
    for group in groups:
        require(
            group.ddp_config is config and shares_config,
            "chunks and their bucket groups read one ddp_config, overlap_grad_reduce in it",
            "another one",
        )
        distributed = config.use_distributed_optimizer
        used = group.intra_distributed_optimizer_instance_group if distributed else group.data_parallel_group
        require(
            _ranks(used) == _ranks(data_group) and used.rank() == data_group.rank(),
            "gradients are reduced over the data-parallel group",
            _ranks(used),
        )
        for bucket in group.buckets:
            require(
                bucket.gradient_scaling_factor == 1.0 and not config.average_in_collective,
                "the reduction sums gradients and does not scale them",
                f"gradient_scaling_factor {bucket.gradient_scaling_factor}",
            )
            require(
                not distributed or bucket.grad_data.numel() % used.size() == 0,
                "the data ranks' shards of a bucket are equally long",
                f"{bucket.grad_data.numel()} elements for {used.size()} ranks",
            )


def _one_optimizer_with_its_group(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    chained, kinds = optimizer.chained_optimizers, len(kinds_of(chunks[0]))
    require(
        len(chained) == kinds,
        "one optimizer has all parameters" + (", and one those of experts" if kinds > 1 else ""),
        f"{len(chained)} chained_optimizers",
    )
    replicas = (
        parallel_state.get_model_parallel_group(),
        parallel_state.get_expert_tensor_model_pipeline_parallel_group(),
    )
    for one, replica in zip(chained, replicas[:kinds], strict=True):
        require(
            isinstance(one, (DistributedOptimizer, Float16OptimizerWithFloat16Params, FP32Optimizer)),
            "the optimizer is one of Megatron's three whose parameters the engine finds",
            type(one).__name__,
        )
        found = _ranks(one.get_grad_stats_parallel_group())
        if chunks[0].ddp_config.use_distributed_optimizer:
            expected = _ranks_of_own_instance()
        else:
            expected = _ranks(replica) or []
        require(
            found == expected,
            f"get_grad_stats_parallel_group() has the ranks that hold different gradients, {expected}",
            found,
        )
    rates = {group["lr"] for group in optimizer.param_groups}
    require(len(rates) == 1, "all param_groups have one learning rate", sorted(rates))
    missing = [name for name in _STEPS if not callable(getattr(optimizer, name, None))]
    require(not missing, f"the optimizer has {', '.join(_STEPS)}", f"no {', '.join(missing)}")


def _ranks_of_own_instance() -> list[int]:
    """All model ranks of the data ranks that share one optimizer's state; tensor ranks are adjacent."""
    tensor: int = parallel_state.get_tensor_model_parallel_world_size()
    data: int = parallel_state.get_data_parallel_world_size()
    size = data // optimizer_instances()

    def instance(rank: int) -> int:
        return rank // tensor % data // size

    return [r for r in range(dist.get_world_size()) if instance(r) == instance(dist.get_rank())]


# -- what the optimizer steps ------------------------------------------------------------------------
def _names(chunks: Sequence[DistributedDataParallel]) -> dict[nn.Parameter, str]:
    """The parameters' names, with the chunk's number where there are several."""
    return {
        parameter: name if len(chunks) == 1 else f"chunk {number}: {name}"
        for number, chunk in enumerate(chunks)
        for name, parameter in chunk.named_parameters()
    }


@torch.no_grad()
def _optimizer_steps_what_this_rank_owns(
    chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer
) -> None:
    names = _names(chunks)
    owned = owned_parts(chunks)
    steppers = optimizer.chained_optimizers
    mains = list(chain.from_iterable(map(main_parameters, steppers)))
    found = {parameter: (start, end) for parameter, _, start, end in mains}
    differing = [
        names[parameter] for parameter in {*owned, *found} if owned.get(parameter) != found.get(parameter)
    ]
    require(
        not differing,
        "a rank steps the part of each parameter whose gradient is in its shard of the bucket",
        f"another part of {', '.join(sorted(differing)[:3])}",
    )
    stepped = {
        id(main) for one in steppers for group in one.optimizer.param_groups for main in group["params"]
    }
    for parameter, main, start, end in mains:
        part = parameter.detach().reshape(-1)[start:end]
        require(
            id(main) in stepped and _same_values(main.detach().reshape(-1), part),
            "the optimizer's parameters hold the model's values",
            f"others for {names[parameter]}",
        )
        require(
            (main.dtype == torch.float32)
            and (parameter.dtype != torch.float32 or main.data_ptr() == part.data_ptr()),
            "the optimizer steps fp32 parameters themselves, and fp32 copies of others",
            f"{main.dtype} for {names[parameter]} in {parameter.dtype}",
        )


def _same_values(main: Tensor, part: Tensor) -> bool:
    """Whether flat ``main`` is flat ``part`` in its own dtype. In pieces, since a copy may be gigabytes."""
    pieces = zip(torch.split(main, _PIECE), torch.split(part, _PIECE), strict=True)
    return all(torch.equal(mine, model.to(mine.dtype)) for mine, model in pieces)


# -- marks -------------------------------------------------------------------------------------------
def _marks_tell_who_counts(chunks: Sequence[DistributedDataParallel], optimizer: MegatronOptimizer) -> None:
    names = _names(chunks)
    for parameter, is_split in chain.from_iterable(map(_known_splits, chunks)):
        marked = bool(getattr(parameter, "tensor_model_parallel", False))
        require(
            marked == is_split,
            "parameter.tensor_model_parallel marks what is split over tensor ranks, and nothing else",
            f"{marked} for {names[parameter]}",
        )
    second_copies = {copy for copy in map(_second_copy, chunks) if copy is not None}
    for parameter, name in names.items():
        require(
            param_is_not_shared(parameter) == (parameter not in second_copies),
            "parameter.shared marks the last stage's copy of tied embeddings, and nothing else",
            f"{not param_is_not_shared(parameter)} for {name}",
        )
    for parameter, main, _, _ in chain.from_iterable(map(main_parameters, optimizer.chained_optimizers)):
        alike = param_is_not_shared(main) == param_is_not_shared(parameter) and (
            param_is_not_tensor_parallel_duplicate(main) == param_is_not_tensor_parallel_duplicate(parameter)
        )
        require(alike, "the optimizer's copies carry the parameters' marks", f"others for {names[parameter]}")


def _known_splits(model: DistributedDataParallel) -> Iterator[tuple[nn.Parameter, bool]]:
    """Parameters of Megatron's own layers and of ours, and whether they are split over tensor ranks."""
    for module in model.modules():
        if isinstance(module, LowRank):
            yield module.lora_A, module.splits_inputs
            yield module.lora_B, not module.splits_inputs
        split = isinstance(module, (ColumnParallelLinear, RowParallelLinear, VocabParallelEmbedding))
        if split or isinstance(module, (RMSNorm, ValueHead)):
            for name, parameter in module.named_parameters(recurse=False):
                yield parameter, split and not (name == "bias" and isinstance(module, RowParallelLinear))


def _second_copy(model: DistributedDataParallel) -> nn.Parameter | None:
    """The last stage's copy of tied embeddings, where the first stage is another."""
    gpt = model.module
    if gpt.share_embeddings_and_output_weights and gpt.post_process and not gpt.pre_process:
        copy: nn.Parameter = gpt.shared_embedding_or_output_weight()
        return copy
    return None


# -- the reduction -----------------------------------------------------------------------------------
@torch.no_grad()
def _reduction_sums_in_place(chunks: Sequence[DistributedDataParallel]) -> None:
    """Reduce a gradient of ones, and compare this rank's shard with the number of ranks that were summed."""
    for chunk in chunks:
        chunk.zero_grad_buffer()
        for buffer in buffers_of(chunk):
            buffer.grad_data.fill_(1.0)
    with without_overlap(chunks):
        chunks[0].config.finalize_model_grads_func(list(chunks))
    names = _names(chunks)
    ranks = {parameter: number for chunk in chunks for parameter, number in _summed_ranks(chunk)}
    for parameter, (start, end) in owned_parts(chunks).items():
        own = parameter.main_grad.reshape(-1)[start:end]  # type: ignore[attr-defined]
        low, high = (float(bound) for bound in own.aminmax())
        require(
            low == high == ranks[parameter],
            f"the reduction leaves the sum over {ranks[parameter]} ranks in this rank's part of the bucket",
            f"{low:g} to {high:g} for {names[parameter]} from gradients of 1",
        )
    for chunk in chunks:
        chunk.zero_grad_buffer()


def _summed_ranks(model: DistributedDataParallel) -> Iterator[tuple[nn.Parameter, int]]:
    """A chunk's trained parameters, and how many ranks' gradients of each are summed."""
    tensor = parallel_state.get_tensor_model_parallel_world_size()
    pipeline = parallel_state.get_pipeline_model_parallel_world_size()
    data = {
        parameter: data_group_of(kind).size()
        for kind, buffer in numbered(model)
        for parameter in buffer.param_index_map
    }
    gpt = model.module
    tied = None
    if gpt.share_embeddings_and_output_weights and (gpt.pre_process or gpt.post_process):
        tied = gpt.shared_embedding_or_output_weight()
    for name, parameter in model.named_parameters():
        if not parameter.requires_grad:
            continue
        over_tensor_ranks = tensor if is_summed_over_tensor_ranks(model.config, name, parameter) else 1
        over_stages = 2 if parameter is tied and pipeline > 1 else 1
        yield parameter, data[parameter] * over_tensor_ranks * over_stages


# -- the gathering -----------------------------------------------------------------------------------
@torch.no_grad()
def _gathering_brings_what_others_step(chunks: Sequence[DistributedDataParallel]) -> None:
    """Overwrite what the other data ranks step, and compare what gathering brings with what was there."""
    if not chunks[0].ddp_config.overlap_param_gather:
        return
    names, owned = _names(chunks), owned_parts(chunks)
    trained = [p for chunk in chunks for buffer in buffers_of(chunk) for p in buffer.param_index_map]
    before = [float(parameter.sum(dtype=torch.float64)) for parameter in trained]
    for parameter in trained:
        start, end = owned.get(parameter, (0, 0))
        for part in (parameter.view(-1)[:start], parameter.view(-1)[end:]):
            part.fill_(float("nan"))
    gathering.mark_stepped(chunks)
    gathering.gather(chunks)
    wrong = [names[p] for p, was in zip(trained, before, strict=True) if p.sum(dtype=torch.float64) != was]
    require(not wrong, "gathering brings what other ranks stepped", f"not all of {', '.join(wrong[:3])}")
