"""Reduce-scatter and all-gather over CPU ranks, in chunks between each two of them.

torch has gloo all-reduce a copy of the whole buffer and takes a part of the result, and gathers into tensors
that it copies once more. Here every rank sends every other one what that one lacks, straight from the buffer.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

_CHUNK_BYTES = 1 << 19  # stays in the cache and in sockets: with 2 MiB two ranks take three times as long
_UNDER_WAY = 2  # chunks: the next one arrives while one is added

_Chunk = tuple[slice, Tensor]  # a range of a part's elements, and another rank's numbers there
_Place = Callable[[int, int, slice], Tensor]  # (number of the chunk, sending rank, range) -> where it arrives


def reduce_scatter_tensor(
    output: Tensor,
    input: Tensor,
    op: dist.ReduceOp.RedOpType = dist.ReduceOp.SUM,
    group: dist.ProcessGroup | None = None,
    async_op: bool = False,
) -> dist.Work | None:
    """``dist.reduce_scatter_tensor``: this rank's part ``[N]`` of ``input [ranks * N]`` summed over ranks.

    ``output`` may be this rank's part of ``input``. Sums on the CPU that the caller waits for are taken here,
    others by torch. The order of a part's summands is the same in every run.
    """
    if async_op or op != dist.ReduceOp.SUM or input.device.type != "cpu":
        work: dist.Work | None = dist.reduce_scatter_tensor(output, input, op, group, async_op)
        return work
    group = _known(group)
    parts, sum_N = _parts(input, group), output.view(-1)
    own_N = parts[group.rank()]
    if sum_N.data_ptr() != own_N.data_ptr():
        sum_N.copy_(own_N)
    arriving = torch.empty(_UNDER_WAY, min(_chunk(input), len(sum_N)), dtype=input.dtype)

    def place(number: int, _: int, where: slice) -> Tensor:
        return arriving[number % _UNDER_WAY, : where.stop - where.start]

    for where, chunk in _exchanged(parts, place, group):
        sum_N[where].add_(chunk)
    return None


def all_gather_into_tensor(
    output: Tensor, input: Tensor, group: dist.ProcessGroup | None = None, async_op: bool = False
) -> dist.Work | None:
    """``dist.all_gather_into_tensor``: the ``input [N]`` of all ranks in ``output [ranks * N]``.

    ``input`` may be this rank's part of ``output``. What the caller waits for on the CPU is gathered here,
    other tensors by torch.
    """
    if async_op or input.device.type != "cpu":
        work: dist.Work | None = dist.all_gather_into_tensor(output, input, group, async_op)
        return work
    group = _known(group)
    parts, own_N = _parts(output, group), input.view(-1)
    if own_N.data_ptr() != parts[group.rank()].data_ptr():
        parts[group.rank()].copy_(own_N)
    for _ in _exchanged([own_N] * group.size(), lambda _, source, where: parts[source][where], group):
        pass
    return None


def _exchanged(outgoing: Sequence[Tensor], place: _Place, group: dist.ProcessGroup) -> Iterator[_Chunk]:
    """Send ``outgoing[r]`` to every other rank r, and yield what they send once it has arrived in its place.

    A place may be used again after the next chunk was asked for.
    """
    rank, size, step = group.rank(), group.size(), _chunk(outgoing[0])
    under_way: deque[tuple[_Chunk, dist.Work, dist.Work]] = deque()
    number = 0
    for distance in range(1, size):
        target, source = (rank + distance) % size, (rank - distance) % size
        for start in range(0, len(outgoing[target]), step):
            where = slice(start, min(start + step, len(outgoing[target])))
            chunk = place(number, source, where)
            sending = group.send([outgoing[target][where]], target, 0)
            under_way.append(((where, chunk), sending, group.recv([chunk], source, 0)))
            number += 1
            if len(under_way) == _UNDER_WAY:
                yield _arrived(*under_way.popleft())
    while under_way:
        yield _arrived(*under_way.popleft())


def _arrived(chunk: _Chunk, sending: dist.Work, receiving: dist.Work) -> _Chunk:
    receiving.wait()
    sending.wait()
    return chunk


def _known(group: dist.ProcessGroup | None) -> dist.ProcessGroup:
    found = group or dist.group.WORLD
    assert found is not None, "before init_process_group"
    return found


def _parts(whole: Tensor, group: dist.ProcessGroup) -> list[Tensor]:
    """The ranks' parts of it, flat and equally long."""
    assert whole.numel() % group.size() == 0, whole.shape
    return list(whole.view(group.size(), -1).unbind())


def _chunk(tensor: Tensor) -> int:
    """Elements of a chunk."""
    return _CHUNK_BYTES // tensor.element_size()
