"""Process groups that consecutive jobs of one layout share: to make them costs more than most jobs."""

from __future__ import annotations

from gapo_mega.engine.megatron.runtime import groups

_current: dict[tuple[int, int], groups.Groups] = {}


def enter(tensor: int, pipeline: int, seed: int = 1) -> groups.Groups:
    """The groups of a layout on this world, freshly seeded; those of another one are closed first."""
    if (tensor, pipeline) not in _current:
        leave()
        _current[tensor, pipeline] = groups.initialize(tensor, pipeline)
    groups.seed(seed)
    return _current[tensor, pipeline]


def leave() -> None:
    """Close the groups; the world stays."""
    if _current:
        groups.shutdown(world_too=False)
        _current.clear()
