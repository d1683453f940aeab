"""Megatron's gathering of stepped parameters over the data ranks, where it overlaps the next forward.

With ``overlap_param_gather`` a step leaves a rank with its own part of the parameters, and every module waits
for its own when its forward begins. Whoever reads them otherwise asks for them here.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from megatron.core.distributed import DistributedDataParallel

from gapo_mega.engine.megatron.model.buffers import bucket_groups_of

Chunks = Sequence[DistributedDataParallel]  # this rank's part of a model, in the order of ``build_chunks``


def mark_stepped(chunks: Chunks) -> None:
    """Have the next forward, or ``gather``, ask for the other ranks' parts."""
    for chunk in chunks:
        for group in bucket_groups_of(chunk):
            group.param_gather_dispatched = False


def gather(chunks: Chunks) -> None:
    """Wait for the parameters that other data ranks have stepped. Collective over the data ranks."""
    for chunk in chunks:
        if chunk.ddp_config.overlap_param_gather:
            for group in bucket_groups_of(chunk):
                group.finish_param_sync(skip_next_bucket_dispatch=True)


@contextmanager
def gathered(chunks: Chunks) -> Iterator[None]:
    """Within the block all parameters are up to date, and no module waits for its own.

    Megatron's waiting asserts that parameters require gradients, so frozen ones must not be waited for.
    """
    gather(chunks)
    waiting = [chunk for chunk in chunks if chunk.ddp_config.overlap_param_gather]
    for chunk in waiting:
        chunk.disable_forward_pre_hook(param_sync=False)
    try:
        yield
    finally:
        for chunk in waiting:
            chunk.enable_forward_pre_hook()
