"""How far the distribution that responses were drawn from is from the trainer's."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from gapo_mega.engine.base import Ranks
from gapo_mega.rollout.correction import log_ratio

# Ratios beyond them are what IcePop masks by default (arXiv 2510.18855).
LEAST, GREATEST = 0.5, 5.0
_QUANTILE = 0.999
_LARGEST_LOG_RATIO = 700.0  # whose exponential float64 holds


def mismatch(ranks: Ranks, trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
    """Over all response tokens of a step, by the log's names. Collective over the data-parallel ranks.

    With ``d = log pi_train - log pi_rollout`` of a token: ``logprob_difference/mean``, ``/max`` and ``/p999``
    are of |d| (the 99.9 percentile with linear interpolation, as numpy's); ``/kl`` is the mean of
    ``e^d - 1 - d``, which estimates KL(rollout || trainer) in nats without bias and is never negative;
    ``/outside`` is the share of tokens with ``e^d`` outside [0.5, 5]. All 0 without a token.
    """
    own_N = log_ratio(trainer_BT, rollout_BT, mask_BT)[mask_BT]
    ratio_N = own_N.clamp(max=_LARGEST_LOG_RATIO).exp()
    outside_N = (ratio_N < LEAST) | (ratio_N > GREATEST)
    kl = (torch.expm1(own_N.clamp(max=_LARGEST_LOG_RATIO)) - own_N).sum()
    count = torch.tensor(float(len(own_N)), dtype=torch.float64)
    sums = torch.stack([own_N.abs().sum(), kl, outside_N.double().sum(), count])
    total, divergence, outside, tokens = ranks.sum_over_data(sums).tolist()
    largest = _largest(ranks, own_N.abs(), int(tokens))
    divisor = max(tokens, 1.0)
    return {
        "logprob_difference/mean": total / divisor,
        "logprob_difference/max": float(largest[0]) if len(largest) else 0.0,
        "logprob_difference/p999": _quantile(largest, int(tokens)),
        "logprob_difference/kl": divergence / divisor,
        "logprob_difference/outside": outside / divisor,
    }


def _place(tokens: int) -> float:
    """Where the quantile lies, counted from the largest value, 0."""
    return (tokens - 1) * (1.0 - _QUANTILE)


def _largest(ranks: Ranks, own_N: Tensor, tokens: int) -> Tensor:
    """The largest values of all ranks that the quantile needs, in descending order.

    They are among each rank's own largest, so that a thousandth of the values travels.
    """
    if tokens == 0:
        return own_N
    wanted = min(tokens, math.floor(_place(tokens)) + 2)
    parts = ranks.gather_over_data(own_N.topk(min(wanted, len(own_N))).values.tolist())
    values = torch.tensor([value for part in parts for value in part], dtype=torch.float64)
    return values.topk(wanted).values


def _quantile(largest: Tensor, tokens: int) -> float:
    if tokens == 0:
        return 0.0
    place = _place(tokens)
    upper = math.floor(place)
    share = place - upper
    first = float(largest[upper])
    if share == 0 or first == (second := float(largest[min(upper + 1, tokens - 1)])):
        return first
    return first + share * (second - first)
