"""Process groups that consecutive jobs of one layout share: to make them costs more than most jobs."""

from __future__ import annotations

from gapo_mega.config import ParallelConfig
from gapo_mega.engine.megatron.runtime import groups

_current: dict[tuple[int, ...], groups.Groups] = {}


def enter(
    tensor: int,
    pipeline: int,
    seed: int = 1,
    *,
    expert: int = 1,
    expert_tensor: int | None = None,
    instances: int = 1,
    context: int = 1,
) -> groups.Groups:
    """The groups of a layout on this world, freshly seeded; those of another one are closed first."""
    layout = (tensor, pipeline, expert, expert_tensor or tensor, instances, context)
    if layout not in _current:
        leave()
        _current[layout] = groups.initialize(*layout[:4], optimizer_instances=instances, context=context)
    groups.seed(seed)
    return _current[layout]


def enter_layout(parallel: ParallelConfig, seed: int = 1) -> groups.Groups:
    """``enter`` for a configuration."""
    expert, expert_tensor = parallel.expert, parallel.expert_tensor
    return enter(
        parallel.tensor,
        parallel.pipeline,
        seed,
        expert=expert,
        expert_tensor=expert_tensor,
        instances=parallel.distributed_optimizer_instances,
        context=parallel.context,
    )


def leave() -> None:
    """Close the groups; the world stays."""
    if _current:
        groups.shutdown(world_too=False)
        _current.clear()
