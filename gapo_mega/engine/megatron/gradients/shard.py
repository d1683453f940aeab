"""This rank's own part of the reduced gradient, as views into Megatron's buffers."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass

import torch
from megatron.core.distributed import DistributedDataParallel
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor, nn

from gapo_mega.engine.megatron.model.buffers import kinds_of
from gapo_mega.engine.megatron.model.main_parameters import Span, owned

STAGGER = 17 * 64  # bytes: whole cache lines, and rows rarely share an offset within a page


@dataclass(frozen=True)
class Placement:
    """Elements ``[start, end)`` of the shard hold a parameter's flat elements from ``first`` on.

    They lie in one piece, which begins at the shard's element ``offset``.
    """

    parameter: nn.Parameter
    piece: int
    offset: int
    start: int
    end: int
    first: int

    def part_of(self, values: Tensor, begin: int) -> Tensor:
        """The part of a parameter's flat ``values``, starting at its element ``begin``, that lies here."""
        start = self.first - begin
        return values[start : start + self.end - self.start]


@dataclass
class Counted:
    """What counts in norms and inner products, of parameters that are summed over one group of ranks.

    Parameters that another rank counts are left out (replicated over tensor ranks, or the second copy of tied
    embeddings). ``segments``: the ``[start, end)`` ranges of ``placements``, merged.
    """

    placements: list[Placement]
    segments: list[Span]


class GradientShard:
    """What this rank owns of the reduced gradient.

    With the distributed optimizer that is its slice of every bucket, without it every whole bucket.

    Attributes:
        pieces: flat views, one per bucket, or one per run of neighbouring parameters with ``only``. Positions
            below count through the concatenated pieces.
        placements: where the parameters lie.
        counted: what counts, by kind of buffer (``buffers.kinds_of``).
        numel: elements of all pieces.
    """

    def __init__(
        self, chunks: Sequence[DistributedDataParallel], only: Collection[nn.Parameter] | None = None
    ) -> None:
        """``only``: take these parameters alone; None takes all."""
        wanted = None if only is None else set(only)
        self.pieces: list[Tensor] = []
        self.placements: list[Placement] = []
        self.numel = 0
        self.counted: list[Counted] = []
        for kind in range(len(kinds_of(chunks[0]))):
            before = len(self.placements)
            for chunk in chunks:
                self._add_buffers(chunk, kind, wanted)
            counted = [placed for placed in self.placements[before:] if _counts(placed.parameter)]
            self.counted.append(Counted(counted, _merge(sorted((p.start, p.end) for p in counted))))

    @property
    def segments(self) -> list[Span]:
        """Those that count of all parameters but experts in buffers of their own."""
        return self.counted[0].segments

    def _add_buffers(
        self, chunk: DistributedDataParallel, kind: int, wanted: set[nn.Parameter] | None
    ) -> None:
        for buffer in kinds_of(chunk)[kind]:
            for index, bucket in enumerate(buffer.buckets):
                spans = {
                    parameter: (first - bucket.offset, last - bucket.offset)
                    for parameter, (first, last, number) in buffer.param_index_map.items()
                    if number == index
                }
                self._add(bucket.grad_data, owned(chunk, kind, bucket.grad_data.numel()), spans, wanted)

    def _add(
        self, data: Tensor, own: Span, spans: dict[nn.Parameter, Span], wanted: set[nn.Parameter] | None
    ) -> None:
        """Add one bucket's part; ``spans`` say where its parameters lie in ``data``."""
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
        """Memory for row ``index``, shaped like the shard and placed for reading beside the other rows."""
        return [_beside(piece, index, dtype) for piece in self.pieces]

    def view(self, row: Sequence[Tensor], placement: Placement) -> Tensor:
        """The part of ``row``, shaped like the shard, at ``placement``."""
        return row[placement.piece][placement.start - placement.offset : placement.end - placement.offset]

    def clear(self) -> None:
        """Zero the pieces."""
        for piece in self.pieces:
            piece.zero_()


def bytes_of(rows: Sequence[Sequence[Tensor]]) -> int:
    """Bytes of all pieces of ``rows``."""
    return sum(piece.numel() * piece.element_size() for row in rows for piece in row)


def exchange(one: Sequence[Tensor], other: Sequence[Tensor]) -> None:
    """Swap two rows' contents, each in its own dtype, in chunks of 4 MiB (64 on GPUs: calls cost more)."""
    size = 1 << 24 if torch.cuda.is_available() else 1 << 20
    for mine, theirs in _chunks(one, other, size):
        kept = mine.clone()
        mine.copy_(theirs)
        theirs.copy_(kept)


def _chunks(one: Sequence[Tensor], other: Sequence[Tensor], size: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Matching chunks of two rows, of at most ``size`` elements."""
    for mine, theirs in zip(one, other, strict=True):
        yield from zip(torch.split(mine, size), torch.split(theirs, size), strict=True)


def _beside(piece: Tensor, index: int, dtype: torch.dtype) -> Tensor:
    """Memory shaped like ``piece``, aligned for kernels that read several rows side by side.

    It starts as many elements past a multiple of 8 as ``piece`` does: shards start wherever Megatron cuts its
    buckets, and a GPU reads rows of different alignment element by element. Each row also starts at another
    offset within a page: large allocations all start at the same one, and their elements would compete for
    the same sets of a CPU's L1 cache (8 rows then take up to 1.2 times as long).
    """
    offset = piece.data_ptr() // piece.itemsize % 8 + index * STAGGER // dtype.itemsize
    # Writes the zeros: a lack of memory then shows here and not in the first update.
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
