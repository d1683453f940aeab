"""Sampling the next token of every row from its logits: pure functions of tensors on any device.

The order of the steps and the meaning of every parameter are those of transformers' ``generate``: repetition
penalty, temperature, top-k, top-p, then a draw. The draw turns one uniform number into a token through the
cumulative distribution. So a row's token depends on its own logits and its own number only, not on the other
rows of the batch or on the layout.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor, nn

from gapo_mega.engine.base import SamplingParameters

_SEED_MASK = 2**64 - 1
_BLOCK = 256  # tokens; about the square root of a vocabulary


class Choice(NamedTuple):
    """The next token of every row."""

    tokens_B: Tensor  # int64
    logprobs_B: Tensor  # float32
    kept_BV: Tensor | None  # bool, the tokens that top-k and top-p left; None if neither is used


def check(sampling: SamplingParameters) -> None:
    """Raise ValueError naming the first parameter that is out of range."""
    ranges: Sequence[tuple[str, float, bool, str]] = (
        ("max_new_tokens", sampling.max_new_tokens, sampling.max_new_tokens >= 1, "at least 1"),
        ("temperature", sampling.temperature, sampling.temperature >= 0, "0 (greedy) or more"),
        ("top_k", sampling.top_k, sampling.top_k >= 0, "0 (whole vocabulary) or more"),
        ("top_p", sampling.top_p, 0 < sampling.top_p <= 1, "above 0, at most 1"),
        ("repetition_penalty", sampling.repetition_penalty, sampling.repetition_penalty > 0, "above 0"),
    )
    for name, found, accepted, words in ranges:
        if not accepted:
            raise ValueError(f"sampling.{name}: found {found}, accepted: {words}")


def uniform_numbers(seed: int, rows: int, steps: int) -> Tensor:
    """float64 ``[rows, steps]`` in [0, 1): row i is the Philox stream with key (seed, i)."""
    keys = np.array([(seed & _SEED_MASK, row) for row in range(rows)], dtype=np.uint64)
    streams = (np.random.Generator(np.random.Philox(key=key)) for key in keys)
    return torch.from_numpy(np.stack([stream.random(steps) for stream in streams]))


def penalize_repetition(logits_BV: Tensor, history_BT: Tensor, penalty: float) -> Tensor:
    """Make every token of a row's history less likely (CTRL, arXiv 1909.05858, sec. 4.1).

    Divides positive logits by ``penalty`` and multiplies negative ones, once per token however often it
    occurs.
    """
    seen_BT = logits_BV.gather(-1, history_BT)
    seen_BT = torch.where(seen_BT < 0, seen_BT * penalty, seen_BT / penalty)
    return logits_BV.scatter(-1, history_BT, seen_BT)


def keep_top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the ``k`` largest logits of a row, with ties of the k-th; the others become minus infinity."""
    kth_B1 = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).values[:, -1:]
    return logits_BV.masked_fill(logits_BV < kth_B1, -torch.inf)


def keep_top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest most likely tokens whose probabilities reach ``p``; others become minus infinity."""
    ascending_BV, order_BV = logits_BV.sort(dim=-1)
    # Ascending order adds small probabilities first, which keeps the sum accurate at the cut.
    dropped_BV = ascending_BV.softmax(dim=-1).cumsum(dim=-1) <= 1 - p
    dropped_BV[:, -1] = False
    return logits_BV.masked_fill(dropped_BV.scatter(-1, order_BV, dropped_BV), -torch.inf)


def draw(logits_BV: Tensor, uniform_B: Tensor) -> tuple[Tensor, Tensor]:
    """Tokens int64 ``[B]``: each row's inverse cumulative distribution at ``uniform_B`` (float64).

    Also returns the logarithm of the sum of ``exp(logits_BV)``, float32 ``[B]``. Finds a block of tokens by
    the blocks' sums first, and then the token in it: the running sums are short.
    """
    maximum_B1 = logits_BV.amax(dim=-1, keepdim=True)
    weights_BV = (logits_BV - maximum_B1).exp_()
    rows, columns = weights_BV.shape
    pieces_BKP = nn.functional.pad(weights_BV, (0, -columns % _BLOCK)).view(rows, -1, _BLOCK)
    # A block is short enough for its own type; only the running sum over blocks needs more.
    blocks_BK = pieces_BKP.sum(dim=-1).double().cumsum_(dim=-1)
    block_B1 = _step(blocks_BK, uniform_B[:, None] * blocks_BK[:, -1:])
    before_B1 = nn.functional.pad(blocks_BK, (1, 0)).gather(1, block_B1)
    within_BP = pieces_BKP.gather(1, block_B1[:, :, None].expand(-1, -1, _BLOCK))[:, 0]
    within_BP = within_BP.cumsum(dim=-1, dtype=torch.float64)
    rest_B1 = uniform_B[:, None] * blocks_BK[:, -1:] - before_B1
    tokens_B1 = block_B1 * _BLOCK + _step(within_BP, rest_B1)
    total_B1 = maximum_B1 + blocks_BK[:, -1:].log()
    return tokens_B1.squeeze(-1).clamp_(max=logits_BV.shape[-1] - 1), total_B1.squeeze(-1).float()


def _step(cumulative_BX: Tensor, level_B1: Tensor) -> Tensor:
    """``[B, 1]``: where running sums first exceed the level, or else reach their total."""
    total_B1 = cumulative_BX[:, -1:]
    # Stays strictly below the total: rounding up to it would point past the last token with a probability.
    level_B1 = torch.minimum(level_B1, torch.nextafter(total_B1, torch.zeros_like(total_B1)))
    # right=True steps over what has probability 0, where the running sum stands still.
    return torch.searchsorted(cumulative_BX, level_B1, right=True).clamp_(max=cumulative_BX.shape[1] - 1)


def choose(logits_BV: Tensor, history_BT: Tensor, uniform_B: Tensor, sampling: SamplingParameters) -> Choice:
    """Sample the next token of every row, and give its log-probability.

    Args:
        logits_BV: float32, true vocabulary only.
        history_BT: int64, prompt and response so far; padding must repeat a token of the same row.
        uniform_B: float64 in [0, 1); unused if greedy.
        sampling: ``temperature`` 0 takes the largest logit, whatever ``top_k`` and ``top_p`` are.

    The log-probability is that of the distribution that the token is drawn from; greedy choices have one
    outcome, and get the log-probability at temperature 1. NaN logits give NaN.
    """
    scores_BV = logits_BV
    if sampling.repetition_penalty != 1.0:
        scores_BV = penalize_repetition(scores_BV, history_BT, sampling.repetition_penalty)
    kept_BV = None
    if sampling.temperature == 0:
        tokens_B, total_B = scores_BV.argmax(dim=-1), scores_BV.logsumexp(dim=-1)
    else:
        if sampling.temperature != 1.0:
            scores_BV = scores_BV / sampling.temperature
        if sampling.top_k > 0:
            scores_BV = keep_top_k(scores_BV, sampling.top_k)
        if sampling.top_p < 1.0:
            scores_BV = keep_top_p(scores_BV, sampling.top_p)
        if sampling.cuts:
            kept_BV = scores_BV != -torch.inf
        tokens_B, total_B = draw(scores_BV, uniform_B)
    logprobs_B = scores_BV.gather(-1, tokens_B[:, None]).squeeze(-1) - total_B
    return Choice(tokens_B, logprobs_B, kept_BV)
