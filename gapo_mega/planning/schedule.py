"""In which order a pipeline stage of Megatron-core runs its passes."""

from __future__ import annotations

from collections.abc import Iterator


def schedule(pipeline: int, virtual: int, stage: int, microbatches: int) -> Iterator[tuple[bool, int]]:
    """Megatron's passes on a stage until memory repeats itself: (whether forward, number of the chunk).

    ``microbatches`` pass in groups through one chunk after the other, and backwards in the reverse order; a
    backward follows every forward once as many are in flight as the stages behind need.
    """
    if virtual == 1:
        ahead = min(pipeline - stage, microbatches)
        yield from [(True, 0)] * ahead
        yield False, 0
        return
    group = microbatch_group(microbatches, pipeline)
    starts = range(0, microbatches, group)
    order = [n for first in starts for n in range(virtual) for _ in range(min(group, microbatches - first))]
    ahead = min((pipeline - stage - 1) * 2 + (virtual - 1) * group, len(order))
    yield from ((True, number) for number in order[:ahead])
    for index in range(min(len(order), virtual * group)):
        if ahead + index < len(order):
            yield True, order[ahead + index]
        yield False, virtual - 1 - order[index]


def microbatch_group(microbatches: int, pipeline: int) -> int:
    """How many microbatches pass through a chunk before any passes through the next one.

    The fewest that Megatron's interleaved schedule accepts, because those in flight hold memory: at least as
    many as stages, and as many must be left for the last group. ``pipeline`` if it divides them.
    """
    assert microbatches >= pipeline
    sizes = range(pipeline, microbatches + 1)
    return next(n for n in sizes if microbatches % n == 0 or microbatches % n >= pipeline)
