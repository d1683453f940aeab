"""Weights that change their type: never out of its range in silence."""

from __future__ import annotations

import torch
from torch import Tensor

# Types that a weight may be stored in; others (FP8, integers) are quantised and mean nothing without a scale.
WEIGHT_DTYPES = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """The type as config.json and messages write it."""
    return str(dtype).removeprefix("torch.")


def is_finite(tensor: Tensor) -> bool:
    """Whether no number is NaN or infinite; takes no memory of the tensor's size."""
    if tensor.numel() == 0:
        return True
    low, high = torch.aminmax(tensor)  # NaN if there is one
    return bool(torch.isfinite(low) & torch.isfinite(high))


def may_overflow(source: torch.dtype, target: torch.dtype) -> bool:
    """Whether ``source`` has finite numbers that are infinite in ``target``."""
    return torch.finfo(source).max > torch.finfo(target).max


def cast(tensor: Tensor, dtype: torch.dtype, what: str) -> Tensor:
    """``tensor`` in another type, rounded. Meta tensors pass, too.

    Raises ``ValueError``, beginning with ``what``, where a finite number would become infinite.
    """
    if tensor.dtype == dtype:
        return tensor
    result = tensor.to(dtype)
    checked = not tensor.is_meta and may_overflow(tensor.dtype, dtype)
    if checked and not is_finite(result) and torch.isinf(result).sum() > torch.isinf(tensor).sum():
        largest = tensor[torch.isfinite(tensor)].abs().max().item()
        raise ValueError(
            f"{what}: found a number of size {largest:.4g}, accepted: at most {torch.finfo(dtype).max:.4g}, "
            f"the largest in {dtype_name(dtype)}"
        )
    return result
