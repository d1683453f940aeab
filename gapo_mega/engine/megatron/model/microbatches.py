"""A batch in microbatches of similar length, each no wider than its own longest sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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

    @classmethod
    def of(
        cls, batch: AnyBatch, size: int, *, together: int = 1, one_width: bool = False
    ) -> Microbatches[AnyBatch]:
        """Pieces of ``size`` rows, the last one perhaps of fewer. The same on all ranks that hold ``batch``.

        Args:
            together: so many consecutive rows stay together, in their order; divides ``size``.
            one_width: all pieces are as wide as the longest row, instead of each by itself.
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
        return cls(parts, order_B, batch.tokens_BT.shape[1])

    @property
    def computed(self) -> int:
        """Tokens that go through the model, but for the padding of sequence parallelism."""
        return sum(part.tokens_BT.numel() for part in self.parts)

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
