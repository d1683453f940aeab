"""This rank's own part of the reduced gradient, as views into Megatron's buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core import parallel_state
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

_STAGGER = 17 * 64  # bytes: whole cache lines, and few rows meet again within a page

Span = tuple[int, int]


@dataclass(frozen=True)
class Placement:
    """Elements ``[start, end)`` of the shard hold a parameter's flat elements from ``first`` on.

    They lie in one piece, which begins at position ``offset``.
    """

    parameter: nn.Parameter
    piece: int
    offset: int
    start: int
    end: int
    first: int

    def part_of(self, values: Tensor, begin: int) -> Tensor:
        """What lies here of the parameter's flat ``values``, which begin at its element ``begin``."""
        start = self.first - begin
        return values[start : start + self.end - self.start]


class GradientShard:
    """What this rank owns of the reduced gradient: its slice of every bucket with the distributed
    optimizer, all of every bucket without.

    ``pieces``: flat views, one a bucket, or one a run of parameters where only some are asked for.
    Positions below are in the concatenation of the pieces. ``segments``: the ``[start, end)`` ranges that
    count in norms and inner products: every parameter but those that another rank counts (replicated over
    tensor ranks, or the second copy of tied embeddings). ``placements``: where the parameters lie;
    ``counted``: of those that count.
    """

    def __init__(self, model: DistributedDataParallel, only: Collection[nn.Parameter] | None = None) -> None:
        """``only``: leave out all other parameters."""
        assert not model.expert_parallel_buffers, "expert parameters need their own groups"
        wanted = None if only is None else set(only)
        self.pieces: list[Tensor] = []
        self.placements: list[Placement] = []
        self.numel = 0
        for buffer in model.buffers:
            for index, bucket in enumerate(buffer.buckets):
                spans = {
                    parameter: (first - bucket.offset, last - bucket.offset)
                    for parameter, (first, last, number) in buffer.param_index_map.items()
                    if number == index
                }
                self._add(bucket.grad_data, owned(model, bucket.grad_data.numel()), spans, wanted)
        self.counted = [placement for placement in self.placements if _counts(placement.parameter)]
        self.segments = _merge(sorted((p.start, p.end) for p in self.counted))

    def _add(
        self, data: Tensor, own: Span, spans: dict[nn.Parameter, Span], wanted: set[nn.Parameter] | None
    ) -> None:
        """One bucket's part; ``spans`` are where its parameters lie in ``data``."""
        if wanted is None:
            ranges = [own]
        else:
            cut = (_cut(span, own) for parameter, span in spans.items() if parameter in wanted)
            ranges = _merge(sorted(span for span in cut if span[0] < span[1]))
        for start, end in ranges:
            self.pieces.append(data[start:end])
            for parameter, span in spans.items():
                low, high = _cut(span, (start, end))
                if low < high:
                    shift = self.numel - start
                    place = (len(self.pieces) - 1, self.numel, low + shift, high + shift)
                    self.placements.append(Placement(parameter, *place, low - span[0]))
            self.numel += end - start

    def zero_row(self, index: int, dtype: torch.dtype = torch.float32) -> list[Tensor]:
        """Row ``index`` of the same shapes; see ``_beside``."""
        return [_beside(piece, index, dtype) for piece in self.pieces]

    def view(self, row: Sequence[Tensor], placement: Placement) -> Tensor:
        """The part of a row of the shard's shape that belongs to ``placement``."""
        return row[placement.piece][placement.start - placement.offset : placement.end - placement.offset]

    def clear(self) -> None:
        """Set the pieces to zero."""
        for piece in self.pieces:
            piece.zero_()


def owned(model: DistributedDataParallel, numel: int) -> Span:
    """This rank's range of a bucket of ``numel`` elements."""
    if not model.ddp_config.use_distributed_optimizer:
        return 0, numel
    group = parallel_state.get_data_parallel_group(with_context_parallel=True)
    size = numel // group.size()
    return group.rank() * size, (group.rank() + 1) * size


def exchange(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Swap what two rows hold, each in its own type; 4 MiB at a time, more where calls cost more."""
    size = 1 << 24 if torch.cuda.is_available() else 1 << 20
    for mine, theirs in _chunks(one, other, size):
        kept = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(kept)


def _chunks(one: Sequence[Tensor], other: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """The same stretches of two rows, of at most ``size`` elements."""
    for mine, theirs in zip(one, other, strict=True):
        yield from zip(torch.split(mine, size), torch.split(theirs, size), strict=True)


def _beside(piece: Tensor, index: int, dtype: torch.dtype) -> Tensor:
    """Memory for a copy of ``piece``, placed for rows that are read side by side.

    As many elements past a multiple of 8: shards start wherever Megatron cuts its buckets, and rows that
    differ in that are read element by element on a GPU. At another place of a page than other rows: large
    allocations all begin at the same one, and their elements would compete for the same sets of a CPU's
    first cache (8 rows then take up to 1.2 times as long).
    """
    offset = piece.data_ptr() // piece.itemsize % 8 + index * _STAGGER // dtype.itemsize
    # Zeroed by writing: where memory does not suffice, that shows here and not in the first update.
    return piece.new_empty(piece.numel() + offset, dtype=dtype)[offset:].zero_()


def _counts(param: nn.Parameter) -> bool:
    return bool(param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param))


def _cut(span: Span, limits: Span) -> Span:
    return max(span[0], limits[0]), min(span[1], limits[1])


def _merge(segments: Sequence[Span]) -> list[Span]:
    merged: list[Span] = []
    for start, end in segments:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged
