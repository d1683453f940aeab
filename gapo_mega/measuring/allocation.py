"""Measures what a block of code allocates.

    with measure_allocations(device) as found:
        ...
    found.peak_bytes, found.net_bytes

On a GPU the counts are those of PyTorch's caching allocator: tensors, rounded up to its 512-byte blocks,
without what it keeps in reserve. Other use of ``torch.cuda.reset_peak_memory_stats`` inside the block spoils
them. On the CPU PyTorch's profiler records every allocation of PyTorch's allocator, the temporary ones inside
operations included. It does not see memory of other libraries (gloo's buffers, Python objects), nor the
release of what was allocated before the block. It sees a release by another thread (gloo's threads release
tensors of a communication that has just ended) only once the address is used again; until then the counts are
too high. Only one profiler can run at a time, so blocks do not nest. It costs about 20 microseconds per
operation inside the block, some hundreds at its end, and writes two lines to standard error.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.autograd.profiler import profile

_MEMORY_EVENT = "[memory]"  # what the profiler calls an allocation or a release


@dataclass
class Allocations:
    """Bytes above those held when the block began; both numbers are set at its end.

    ``peak_bytes``: the most at once. ``net_bytes``: what is left at the end; on a GPU, minus the earlier
    memory that the block freed.
    """

    peak_bytes: int = 0
    net_bytes: int = 0


@contextmanager
def measure_allocations(device: torch.device | str) -> Iterator[Allocations]:
    """Measure the block's allocations on ``device``, one of type ``cuda`` or ``cpu``."""
    kind = torch.device(device).type
    if kind not in ("cpu", "cuda"):
        raise ValueError(f"device: found {device}, accepted: a cpu or cuda device")
    found = Allocations()
    with _on_cuda(device, found) if kind == "cuda" else _on_cpu(found):
        yield found


@contextmanager
def _on_cuda(device: torch.device | str, found: Allocations) -> Iterator[None]:
    torch.cuda.synchronize(device)
    before = torch.cuda.memory_allocated(device)
    torch.cuda.reset_peak_memory_stats(device)
    yield
    torch.cuda.synchronize(device)
    found.peak_bytes = torch.cuda.max_memory_allocated(device) - before
    found.net_bytes = torch.cuda.memory_allocated(device) - before


@contextmanager
def _on_cpu(found: Allocations) -> Iterator[None]:
    with profile(profile_memory=True) as profiler:
        yield
    held: dict[int, int] = {}  # bytes by address
    standing = 0
    for _, address, size in sorted(_changes(profiler.kineto_results.experimental_event_tree())):
        # An address that is allocated again was freed unseen; a freed one not held is older than the block.
        standing -= held.pop(address, 0)
        if size > 0:
            held[address] = size
            standing += size
        found.peak_bytes = max(found.peak_bytes, standing)
    found.net_bytes = standing


def _changes(roots: Sequence[Any]) -> Iterator[tuple[int, int, int]]:
    """(nanoseconds, address, bytes) of every allocation, with negative bytes of every release."""
    waiting = list(roots)
    while waiting:
        event = waiting.pop()
        if event.name == _MEMORY_EVENT:
            yield event.start_time_ns, event.extra_fields.ptr, event.extra_fields.alloc_size
        waiting += event.children
