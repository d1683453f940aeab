"""Gram matrices of running means, from inner products alone: the means themselves may be anywhere."""

from __future__ import annotations

from torch import Tensor


def averaged_grams(products: Tensor, beta: float, updates: int) -> tuple[Tensor, Tensor]:
    """The Gram matrices of gradients g, and of their running means as they will be with g, [..., M, M] each.

    A mean is ``beta M_k + (1 - beta) g_k``, which counts as ``M_k / (1 - beta^t)`` after t updates, as Adam's
    first moment does. The product of sums is a sum of products, so no mean has to be formed.

    Args:
        products: inner products of ``[*means, *g]``, [..., 2 M, 2 M] float64, the means as they are.
        updates: t, how many gradients the means hold.
    """
    count = products.shape[-1] // 2
    old, new = slice(count), slice(count, 2 * count)
    gram = products[..., new, new].contiguous()
    crossed = products[..., old, new] + products[..., new, old]
    mean = beta**2 * products[..., old, old] + beta * (1 - beta) * crossed + (1 - beta) ** 2 * gram
    return gram, mean / (1 - beta ** (updates + 1)) ** 2
