"""The numbers of options that several scalarizers have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def preference_of(value: Sequence[float] | None, count: int) -> Tensor:
    """``u`` float64 [M] with sum 1; None gives every objective 1/M."""
    numbers = weights_of(value, count)
    return numbers / numbers.sum()


def weights_of(value: Sequence[float] | None, count: int) -> Tensor:
    """Weights float64 [M] as they are; None gives every objective 1."""
    return torch.tensor([1.0] * count if value is None else list(value), dtype=torch.float64)
