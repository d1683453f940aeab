"""Megatron's gradient buffers of a chunk: with expert parallelism those of experts are a kind of their own.

Every kind is reduced over a data-parallel group of its own, and stepped by an optimizer of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel


def kinds_of(chunk: DistributedDataParallel) -> list[list[Any]]:
    """The buffers by kind, in the order of the optimizers: of most parameters, then of experts, if any."""
    return [kind for kind in (chunk.buffers, chunk.expert_parallel_buffers) if kind]


def numbered(chunk: DistributedDataParallel) -> Iterator[tuple[int, Any]]:
    """All buffers, each with the place of its kind."""
    for kind, buffers in enumerate(kinds_of(chunk)):
        for buffer in buffers:
            yield kind, buffer


def buffers_of(chunk: DistributedDataParallel) -> list[Any]:
    """All buffers."""
    return [*chunk.buffers, *chunk.expert_parallel_buffers]


def bucket_groups_of(chunk: DistributedDataParallel) -> list[Any]:
    """All groups of buckets."""
    return [*chunk.bucket_groups, *chunk.expert_parallel_bucket_groups]


def data_group_of(kind: int) -> dist.ProcessGroup:
    """The ranks over which buffers of a kind, by its place in ``kinds_of``, are reduced."""
    group: dist.ProcessGroup = (
        parallel_state.get_data_parallel_group(with_context_parallel=True)
        if kind == 0
        else parallel_state.get_expert_data_parallel_group()
    )
    return group


def shard_group_of(kind: int) -> dist.ProcessGroup:
    """The ranks of one instance of the distributed optimizer, which share the buffers of a kind.

    With one instance they are ``data_group_of``.
    """
    group: dist.ProcessGroup = (
        parallel_state.get_data_parallel_group(with_context_parallel=True, partial_data_parallel=True)
        if kind == 0
        else parallel_state.get_expert_data_parallel_group(partial_expert_data_parallel=True)
    )
    return group


def optimizer_instances() -> int:
    """Instances of the distributed optimizer among which the data ranks are shared."""
    return data_group_of(0).size() // shard_group_of(0).size()


def is_first_instance() -> bool:
    """Whether this rank is of the instance of data rank 0."""
    return data_group_of(0).rank() < shard_group_of(0).size()
