"""How the sum of a loss over response tokens becomes a mean over a minibatch.

A loss sums over the tokens of a microbatch, and the engine divides the sum over microbatches and ranks by one
number that all ranks share. So no mean depends on which rows share a microbatch or a rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from torch import Tensor

Normalization = Literal["token_mean", "sequence_mean", "fixed_length"]


@dataclass(frozen=True)
class ResponseCounts:
    """Of a minibatch over all data-parallel ranks."""

    tokens: float  # of responses
    sequences: float  # with a response token
    longest: int  # tokens that a response may have: ``rollout.max_new_tokens``


def total(values_BT: Tensor, mask_BT: Tensor, normalization: Normalization) -> Tensor:
    """What a loss returns for its values [B, T] at response tokens, which are 0 elsewhere: a scalar.

    ``sequence_mean``: the sum over sequences of their means. Otherwise the sum over tokens.
    """
    if normalization != "sequence_mean":
        return values_BT.sum()
    lengths_B = mask_BT.sum(dim=1).clamp(min=1)
    return (values_BT.sum(dim=1) / lengths_B).sum()


def divisor(normalization: Normalization, counts: ResponseCounts) -> float:
    """What the engine divides the sum of ``total`` over microbatches and ranks by.

    ``token_mean``: the number of response tokens, so that every token weighs the same (DAPO, arXiv
    2503.14476). ``sequence_mean``: the number of sequences, so that every response weighs the same (GRPO,
    arXiv 2402.03300). ``fixed_length``: sequences times the longest response, a constant, so that a token's
    weight does not depend on the length of any response (Dr. GRPO, arXiv 2503.20783). At least 1: a minibatch
    without a response token has the loss 0.
    """
    if normalization == "token_mean":
        return max(counts.tokens, 1.0)
    sequences = max(counts.sequences, 1.0)
    return sequences if normalization == "sequence_mean" else sequences * counts.longest
