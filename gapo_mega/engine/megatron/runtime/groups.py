"""Process groups: Megatron's parallel state, plus gloo groups for small CPU tensors and objects."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state, tensor_parallel
from torch import Tensor

from gapo_mega.config import ParallelConfig
from gapo_mega.engine.base import Layout, generator_seed
from gapo_mega.engine.megatron.runtime import random_states
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.engine.process_group import TIMEOUT, start_process_group
from gapo_mega.planning.world import read_world


@dataclass(frozen=True)
class Groups:
    """The layout and its gloo groups for CPU tensors and objects."""

    layout: Layout
    data: dist.ProcessGroup  # same tensor, context and pipeline rank
    holders: dist.ProcessGroup  # same tensor and pipeline rank: they hold the same part of the model
    replica: dist.ProcessGroup  # same data rank: the ranks that have the same sequences
    copy: dist.ProcessGroup  # and the same positions of them: the ranks that hold one copy of the model
    context: dist.ProcessGroup  # same data, tensor and pipeline rank: they share every sequence
    expert_data: dist.ProcessGroup  # the ranks with the same part of the same experts

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """All-reduce a CPU tensor over the data-parallel ranks into a new tensor."""
        result = tensor.clone()
        dist.all_reduce(result, group=self.data)
        return result

    def gather_over_data(self, value: Any) -> list[Any]:
        """All-gather picklable values over the data-parallel ranks, in rank order."""
        values: list[Any] = [None] * self.layout.data
        dist.all_gather_object(values, value, group=self.data)
        return values

    def broadcast_in_replica(self, value: Any, source: int = 0) -> Any:
        """Broadcast the picklable value of the replica's rank ``source`` (0: first pipeline stage)."""
        box = [value]
        dist.broadcast_object_list(box, src=dist.get_global_rank(self.replica, source), group=self.replica)
        return box[0]

    def from_last_stage(self, tensor: Tensor) -> Tensor:
        """Broadcast the last stage's CPU tensor (same shape and dtype everywhere) to a new tensor."""
        result = tensor.clone()
        source = dist.get_global_rank(self.replica, self.layout.first_of_last_stage)
        dist.broadcast(result, src=source, group=self.replica)
        return result


class Collective:
    """The communication of ``Ranks`` and ``Trainable`` (``engine/base.py``) over these groups."""

    def __init__(self, groups: Groups) -> None:
        self.groups = groups
        self.layout = groups.layout

    def sum_over_data(self, tensor: Tensor) -> Tensor:
        return self.groups.sum_over_data(tensor)

    def gather_over_data(self, value: Any) -> list[Any]:
        return self.groups.gather_over_data(value)

    def broadcast_in_replica(self, value: Any) -> Any:
        return self.groups.broadcast_in_replica(value)

    def barrier(self) -> None:
        dist.barrier()

    def everywhere(self, holds: bool) -> bool:
        """Whether it holds on all ranks. One all-reduce of a CPU tensor over the world."""
        found = torch.tensor(int(holds))
        dist.all_reduce(found, op=dist.ReduceOp.MIN)
        return bool(found)

    def random_states(self) -> dict[str, Any]:
        return random_states.current()

    def restore_random_states(self, states: dict[str, Any]) -> None:
        random_states.restore(states)

    def close(self) -> None:
        shutdown()


def initialize(
    tensor: int,
    pipeline: int,
    expert: int = 1,
    expert_tensor: int | None = None,
    timeout: timedelta = TIMEOUT,
    optimizer_instances: int = 1,
    context: int = 1,
) -> Groups:
    """Initialize torch.distributed, unless it is, and Megatron's parallel state.

    ``expert``: ranks that share a layer's experts; ``expert_tensor``: those that share every expert, ``None``
    being ``tensor``. ``timeout``: the longest wait for other ranks in a collective of any of their groups.
    ``optimizer_instances``: of the distributed optimizer, among which the data ranks are shared. ``context``:
    ranks that share every sequence.
    The launcher's variables say which rank of how many this is (``read_world``).
    Raises ``ValueError`` for variables that do not fit together or do not fit this machine, and if
    ``tensor * context * pipeline`` does not divide the world size.
    """
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.set_device(_own_device(read_world().local_rank, torch.cuda.device_count()))
    if not dist.is_initialized():
        start_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout)
    world = dist.get_world_size()
    model = tensor * context * pipeline
    if world % model:
        raise ValueError(
            f"parallel: found tensor {tensor} x context {context} x pipeline {pipeline} = {model} ranks, "
            f"accepted: a product that divides the world size {world}"
        )
    with megatron_device():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tensor,
            pipeline_model_parallel_size=pipeline,
            context_parallel_size=context,
            expert_model_parallel_size=expert,
            expert_tensor_parallel_size=expert_tensor,
            num_distributed_optimizer_instances=optimizer_instances,
            distributed_timeout_minutes=timeout / timedelta(minutes=1),
        )
    sharing = expert * (expert_tensor or tensor)
    layout = Layout(
        world=world,
        rank=dist.get_rank(),
        tensor=tensor,
        pipeline=pipeline,
        data=world // model,
        data_rank=parallel_state.get_data_parallel_rank(),
        tensor_rank=parallel_state.get_tensor_model_parallel_rank(),
        pipeline_rank=parallel_state.get_pipeline_model_parallel_rank(),
        in_step=tensor % sharing != 0,
        context=context,
        context_rank=parallel_state.get_context_parallel_rank(),
    )
    replica, data = _replica_group(layout, timeout), _data_group(layout, timeout)
    return Groups(
        layout,
        data=data,
        holders=data if context == 1 else _holders_group(layout, timeout),
        replica=replica,
        copy=replica if context == 1 else _copy_group(layout, timeout),
        context=_context_group(layout, timeout),
        expert_data=_expert_data_group(layout, sharing, timeout),
    )


def of_layout(parallel: ParallelConfig) -> Groups:
    """``initialize`` for a configuration."""
    return initialize(
        parallel.tensor,
        parallel.pipeline,
        parallel.expert,
        parallel.expert_tensor,
        parallel.timeout,
        parallel.distributed_optimizer_instances,
        parallel.context,
    )


def seed(value: int) -> None:
    """Seed the model-parallel random numbers: equal over data ranks, different for each tensor rank."""
    with megatron_device():
        tensor_parallel.model_parallel_cuda_manual_seed(generator_seed(value), force_reset_rng=True)


def shutdown(world_too: bool = True) -> None:
    """Undo ``initialize``; ``world_too=False`` keeps torch.distributed for another layout."""
    parallel_state.destroy_model_parallel()
    if not dist.is_initialized():
        return
    if world_too:
        dist.destroy_process_group()
        return
    # Megatron forgets its groups without destroying them, and each would keep its gloo threads.
    for group in list(dist.distributed_c10d._world.pg_map):
        if group is not dist.group.WORLD:
            dist.destroy_process_group(group)


def _own_device(local_rank: int, devices: int) -> int:
    """The number of this rank's GPU. Raises ``ValueError`` where this machine has fewer."""
    if local_rank >= devices:
        raise ValueError(
            f"LOCAL_RANK: found {local_rank}, but torch sees {devices} CUDA devices; accepted: 0 to "
            f"{devices - 1}"
        )
    return local_rank


def _coordinates(layout: Layout, rank: int) -> tuple[int, int, int, int]:
    """(pipeline, data, context, tensor) rank of a global rank in Megatron's order, tensor ranks adjacent."""
    of_data = layout.tensor * layout.context
    return (
        rank // (of_data * layout.data),
        rank // of_data % layout.data,
        rank // layout.tensor % layout.context,
        rank % layout.tensor,
    )


def _split_world(
    layout: Layout, place_of: Callable[[int], tuple[int, ...]], timeout: timedelta
) -> dist.ProcessGroup:
    """The gloo group of the ranks that have this rank's ``place_of``."""
    members: dict[tuple[int, ...], list[int]] = {}
    for rank in range(layout.world):
        members.setdefault(place_of(rank), []).append(rank)
    mine = place_of(layout.rank)
    own: dist.ProcessGroup | None = None
    for key, ranks in members.items():  # new_group is collective: every rank makes every group, in this order
        group = dist.new_group(ranks, backend="gloo", timeout=timeout)
        if key == mine:
            own = group
    assert own is not None
    return own


def _data_group(layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    own = (layout.pipeline_rank, layout.data_rank, layout.context_rank, layout.tensor_rank)
    assert _coordinates(layout, layout.rank) == own

    def place_of(rank: int) -> tuple[int, ...]:
        pipeline, _, context, tensor = _coordinates(layout, rank)
        return pipeline, context, tensor

    return _split_world(layout, place_of, timeout)


def _replica_group(layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    return _split_world(layout, lambda rank: (_coordinates(layout, rank)[1],), timeout)


def _holders_group(layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    def place_of(rank: int) -> tuple[int, ...]:
        pipeline, _, _, tensor = _coordinates(layout, rank)
        return pipeline, tensor

    return _split_world(layout, place_of, timeout)


def _copy_group(layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    return _split_world(layout, lambda rank: _coordinates(layout, rank)[1:3], timeout)


def _context_group(layout: Layout, timeout: timedelta) -> dist.ProcessGroup:
    def place_of(rank: int) -> tuple[int, ...]:
        pipeline, data, _, tensor = _coordinates(layout, rank)
        return pipeline, data, tensor

    return _split_world(layout, place_of, timeout)


def _expert_data_group(layout: Layout, sharing: int, timeout: timedelta) -> dist.ProcessGroup:
    """``sharing``: neighbouring ranks of a stage that together hold its experts once."""
    stage = layout.tensor * layout.context * layout.data
    return _split_world(layout, lambda rank: (rank // stage, rank % stage % sharing), timeout)
