"""Which sequence every row of a tensor is of, as the products of weight gradients need it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowSequences:
    """Of R rows.

    Attributes:
        numbers_R: int64.
        runs: (number, first row, end) of every sequence that has rows; None if one's rows are not together.
        order_R: rows that the runs are of, in their order; None: the rows as they lie.
        of_sharers: the numbers count the sequences of all data ranks that share experts (``Sharers``).
    """

    numbers_R: Tensor
    runs: tuple[tuple[int, int, int], ...] | None
    order_R: Tensor | None = None
    of_sharers: bool = False

    @classmethod
    def of(cls, numbers_R: Tensor) -> RowSequences:
        """From numbers on the host."""
        found, counts = torch.unique_consecutive(numbers_R, return_counts=True)
        if len(found) > len(torch.unique(found)):
            return cls(numbers_R, None)
        ends = counts.cumsum(dim=0)
        runs = torch.stack([found, ends - counts, ends], dim=1).tolist()
        return cls(numbers_R, tuple((number, start, end) for number, start, end in runs))

    def to(self, device: torch.device) -> RowSequences:
        """The same with its tensor on ``device``."""
        order_R = None if self.order_R is None else self.order_R.to(device)
        return replace(self, numbers_R=self.numbers_R.to(device), order_R=order_R)

    def in_runs(self, rows_RX: Tensor) -> Tensor:
        """The rows in the order of ``runs``."""
        return rows_RX if self.order_R is None else rows_RX.index_select(0, self.order_R)

    def sums(self, terms_RN: Tensor, count: int) -> Tensor:
        """``[count, N]`` float32: the sum of every sequence's rows."""
        sums_BN = torch.zeros(count, terms_RN.shape[1], dtype=torch.float32, device=terms_RN.device)
        return sums_BN.index_add_(0, self.numbers_R, terms_RN.float())
