"""Checks of options that several scalarizers have."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from gapo_mega.aggregation.base import is_number

# People type preferences, and write 1/3 as 0.3333.
_SUM_TOLERANCE = 1e-3


def require_number(
    option: str, value: float, least: float | None = None, most: float | None = None, *, above: bool = False
) -> None:
    """Raise ``ValueError`` unless ``value`` is a finite number from ``least`` (or above it) to ``most``."""
    fits = is_number(value) and (least is None or (value > least if above else value >= least))
    if fits and (most is None or value <= most):
        return
    limits = [] if least is None else [f"{'>' if above else '>='} {least:g}"]
    limits += [] if most is None else [f"<= {most:g}"]
    raise ValueError(f"{option}: found {value!r}, accepted: a finite number {' and '.join(limits)}".rstrip())


def require_preference(option: str, value: Sequence[float] | None, *, zeros: bool) -> None:
    """Raise ``ValueError`` unless ``value`` is None or one number per objective, with sum 1 within 0.001.

    ``zeros``: whether numbers may be 0; they may not be negative.
    """
    if value is None:
        return
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    fits = bool(numbers) and all(is_number(x) and (x >= 0 if zeros else x > 0) for x in numbers)
    if not fits or abs(sum(numbers) - 1.0) > _SUM_TOLERANCE:
        raise ValueError(
            f"{option}: found {value!r}, accepted: a list of numbers {'>=' if zeros else '>'} 0 with sum 1"
        )


def require_weights(option: str, value: Sequence[float] | None) -> None:
    """Raise ``ValueError`` unless ``value`` is None or one number >= 0 per objective, not all 0."""
    if value is None:
        return
    numbers = list(value) if isinstance(value, Sequence) and not isinstance(value, str) else []
    if not numbers or not all(is_number(x) and x >= 0 for x in numbers) or not any(numbers):
        raise ValueError(f"{option}: found {value!r}, accepted: a list of finite numbers >= 0, not all 0")


def preference_of(value: Sequence[float] | None, count: int) -> Tensor:
    """``u`` float64 [M] with sum 1; None gives every objective 1/M."""
    numbers = weights_of(value, count)
    return numbers / numbers.sum()


def weights_of(value: Sequence[float] | None, count: int) -> Tensor:
    """Weights float64 [M] as they are; None gives every objective 1."""
    return torch.tensor([1.0] * count if value is None else list(value), dtype=torch.float64)
