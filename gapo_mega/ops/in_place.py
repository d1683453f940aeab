"""What torch checks before, and records after, its own operations in place; ours write through addresses."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor


def require_writable(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` where torch, too, would refuse to write, or would record what we cannot.

    That is a tensor that requires grad while gradients are recorded, or one made in inference mode, outside
    that mode.
    """
    if torch.is_grad_enabled() and tensor.requires_grad:
        what = "a leaf that requires grad" if tensor.is_leaf else "a tensor that requires grad"
        raise ValueError(
            f"{name}: found {what}, accepted: one that does not, or any within torch.no_grad(); autograd "
            "cannot record what is written here"
        )
    if tensor.is_inference() and not torch.is_inference_mode_enabled():
        raise ValueError(
            f"{name}: found a tensor made in inference mode, accepted outside it: an ordinary tensor "
            "(clone() makes one)"
        )


def require_constant(name: str, tensor: Tensor) -> None:
    """Raise ``ValueError`` for an operand that requires grad while gradients are recorded.

    Torch's operations with ``out`` refuse it as well: the result would look like a constant.
    """
    if torch.is_grad_enabled() and tensor.requires_grad:
        raise ValueError(
            f"{name}: found a tensor that requires grad, accepted: one that does not, or any within "
            "torch.no_grad(); the result has no derivative"
        )


def require_apart(name: str, tensor: Tensor, others: Iterable[tuple[str, Tensor]]) -> None:
    """Raise ``ValueError`` if a contiguous ``tensor`` that is written shares memory with another operand."""
    begin, end = extent(tensor)
    for other_name, other in others:
        other_begin, other_end = extent(other)
        if max(begin, other_begin) < min(end, other_end):
            raise ValueError(f"{name}: overlaps {other_name}, accepted: memory of its own")


def extent(tensor: Tensor) -> tuple[int, int]:
    """First address of a contiguous tensor's elements, and the one after the last."""
    begin = tensor.data_ptr()
    return begin, begin + tensor.numel() * tensor.element_size()


def written(tensors: Sequence[Tensor]) -> None:
    """Tell autograd, so that a backward that needs the old values fails instead of using the new ones."""
    torch.autograd.graph.increment_version(tensors)
