"""A batch in microbatches: of similar length, each no wider than its longest sequence, or packed in rows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Generic

import torch
from torch import Tensor

from gapo_mega.types import AnyBatch


@dataclass(frozen=True)
class Microbatches(Generic[AnyBatch]):
    """The pieces, longest first: if memory does not suffice, the first microbatch shows it."""

    parts: list[AnyBatch]
    order_B: Tensor  # int64: the batch's rows as they follow each other in the parts
    columns: int  # of the batch
    multiple: int = 1  # that a model pads unpacked rows to

    @classmethod
    def of(
        cls, batch: AnyBatch, size: int, *, together: int = 1, one_width: bool = False, multiple: int = 1
    ) -> Microbatches[AnyBatch]:
        """Pieces of ``size`` rows, the last one perhaps of fewer. The same on all ranks that hold ``batch``.

        Args:
            together: so many consecutive rows stay together, in their order; divides ``size``.
            one_width: all pieces are as wide as the longest row, instead of each by itself.
            multiple: that a model pads them to, which ``computed`` counts.
        """
        assert size % together == 0, (size, together)
        lengths_B = batch.lengths_B
        longest_G = lengths_B.view(-1, together).amax(dim=1)
        group_G = longest_G.argsort(descending=True, stable=True)
        order_B = (group_G[:, None] * together + torch.arange(together)).view(-1)
        pieces = torch.split(order_B, size) if len(order_B) else ()
        widest = int(lengths_B.max()) if len(order_B) else 0
        parts = [
            batch.select(rows).cut(widest if one_width else int(lengths_B[rows].max())) for rows in pieces
        ]
        return cls(parts, order_B, batch.tokens_BT.shape[1], multiple)

    @classmethod
    def packed(
        cls, batch: AnyBatch, tokens: int, *, least: int = 1, multiple: int = 1, one_width: bool = False
    ) -> Microbatches[AnyBatch]:
        """Pieces of at most ``tokens`` tokens without padding, or of one longer sequence.

        As few as first-fit-decreasing finds; the same on all ranks that hold ``batch``.

        Args:
            least: at least so many pieces, as far as there are sequences.
            multiple: widths are rounded up to a multiple of it.
            one_width: all rows are as wide as the widest.
        """
        lengths_B = batch.lengths_B
        lengths: list[int] = lengths_B.tolist()
        pieces = _split_up(_first_fit(lengths, tokens), lengths, min(least, len(lengths)))
        pieces.sort(key=lambda rows: -sum(lengths[row] for row in rows))
        widths = [sum(lengths[row] for row in rows) for rows in pieces]
        widths = [width + -width % multiple for width in widths]
        if one_width and widths:
            widths = [max(widths)] * len(widths)
        parts = [
            replace(
                batch.select(torch.tensor(rows)).cut(max(lengths[row] for row in rows)), packed_width=width
            )
            for rows, width in zip(pieces, widths, strict=True)
        ]
        order_B = torch.tensor([row for rows in pieces for row in rows], dtype=torch.int64)
        return cls(parts, order_B, batch.tokens_BT.shape[1])

    @property
    def computed(self) -> int:
        """Tokens that go through the model."""
        return sum(map(self._computed_of, self.parts))

    def _computed_of(self, part: AnyBatch) -> int:
        rows, columns = part.tokens_BT.shape
        return part.packed_width or rows * (columns + -columns % self.multiple)

    def rejoin(self, found: Sequence[Tensor], dim: int = 0) -> Tensor:
        """One tensor for the batch from one ``[..., b, ..., t]`` for each part; 0 where a part was cut off.

        ``dim``: of the rows; columns are the last dimension.
        """
        pad = torch.nn.functional.pad
        wide = [pad(part, (0, self.columns - part.shape[-1])) for part in found]
        return self.rejoin_rows(wide, dim)

    def rejoin_rows(self, found: Sequence[Tensor], dim: int = 0) -> Tensor:
        """Like ``rejoin`` for tensors without columns."""
        return torch.cat(list(found), dim=dim).index_select(dim, self.order_B.argsort())


def _first_fit(lengths: Sequence[int], most: int) -> list[list[int]]:
    """Rows in pieces of at most ``most`` tokens, by first fit of decreasing lengths.

    Of sequences of at most L tokens every piece but the last has at least ``most // L``.
    """
    pieces: list[list[int]] = []
    room: list[int] = []
    for row in sorted(range(len(lengths)), key=lambda row: -lengths[row]):
        found = next((i for i, left in enumerate(room) if left >= lengths[row]), len(pieces))
        if found == len(pieces):
            pieces.append([])
            room.append(most)
        pieces[found].append(row)
        room[found] -= lengths[row]
    return pieces


def _split_up(pieces: list[list[int]], lengths: Sequence[int], least: int) -> list[list[int]]:
    """The pieces, the fullest of which are halved until there are ``least``."""
    pieces = list(pieces)
    while len(pieces) < least:
        several = [i for i, rows in enumerate(pieces) if len(rows) > 1]
        fullest = max(several, key=lambda i: sum(lengths[row] for row in pieces[i]))
        rows = pieces.pop(fullest)
        pieces += [rows[::2], rows[1::2]]  # in order of length, so that halves are alike
    return pieces
