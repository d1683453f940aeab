"""Which sequence every row of a packed tensor is of, as the products of weight gradients need it."""

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
    """

    numbers_R: Tensor
    runs: tuple[tuple[int, int, int], ...] | None

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
        return replace(self, numbers_R=self.numbers_R.to(device))

    def sums(self, terms_RN: Tensor, count: int) -> Tensor:
        """``[count, N]`` float32: the sum of every sequence's rows."""
        sums_BN = torch.zeros(count, terms_RN.shape[1], dtype=torch.float32, device=terms_RN.device)
        return sums_BN.index_add_(0, self.numbers_R, terms_RN.float())
