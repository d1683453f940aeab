"""What Megatron's optimizers step: parameters, their fp32 copies, or shards of either."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.optimizer import MegatronOptimizer
from megatron.core.optimizer.distrib_optimizer import DistributedOptimizer
from megatron.core.optimizer.optimizer import Float16OptimizerWithFloat16Params, FP32Optimizer
from torch import Tensor, nn

from gapo_mega.engine.megatron.model.buffers import numbered, shard_group_of

Span = tuple[int, int]


def steps_taken(inner: torch.optim.Optimizer) -> int:
    """Steps that Adam has taken; 0 for SGD, which does not count them."""
    holders = [*inner.state.values(), *inner.param_groups]
    steps = {int(holder["step"]) for holder in holders if "step" in holder}
    assert len(steps) <= 1, "parameters were stepped unequally often"
    return max(steps, default=0)


def main_parameters(optimizer: MegatronOptimizer) -> Iterator[tuple[nn.Parameter, Tensor, int, int]]:
    """(model parameter, the tensor that the inner optimizer steps, its range in the flat parameter)."""
    if isinstance(optimizer, DistributedOptimizer):
        for parameter, (group, order) in optimizer.model_param_group_index_map.items():
            held = optimizer._get_model_param_range_map(parameter)["param"]
            yield parameter, optimizer.optimizer.param_groups[group]["params"][order], held.start, held.end
    elif isinstance(optimizer, Float16OptimizerWithFloat16Params):
        pairs = zip(optimizer.float16_groups, optimizer.fp32_from_float16_groups, strict=True)
        for parameters, mains in pairs:
            for parameter, main in zip(parameters, mains, strict=True):
                yield parameter, main, 0, parameter.numel()
    else:
        assert isinstance(optimizer, FP32Optimizer)
        for parameter in optimizer.get_parameters():
            yield parameter, parameter, 0, parameter.numel()


def owned_parts(chunks: Sequence[DistributedDataParallel]) -> dict[nn.Parameter, Span]:
    """This rank's range in each flat parameter that it steps a part of, by the buffers alone."""
    parts: dict[nn.Parameter, Span] = {}
    for chunk in chunks:
        for kind, buffer in numbered(chunk):
            for parameter, (first, last, number) in buffer.param_index_map.items():
                bucket = buffer.buckets[number]
                low, high = owned(chunk, kind, bucket.grad_data.numel())
                start, end = max(first, bucket.offset + low), min(last, bucket.offset + high)
                if start < end:
                    parts[parameter] = start - first, end - first
    return parts


def owned(model: DistributedDataParallel, kind: int, numel: int) -> Span:
    """This rank's range of a bucket of ``numel`` elements, in a buffer of a kind (``kinds_of``)."""
    if not model.ddp_config.use_distributed_optimizer:
        return 0, numel
    group = shard_group_of(kind)
    size = numel // group.size()
    return group.rank() * size, (group.rank() + 1) * size
