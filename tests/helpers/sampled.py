"""The distribution that tokens are drawn from, by transformers' logits processors; differentiable."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers.generation.logits_process import (
    LogitsProcessorList,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from gapo_mega.types import KeptTokens


def processors(
    temperature: float = 1.0, penalty: float = 1.0, top_k: int = 0, top_p: float = 1.0
) -> LogitsProcessorList:
    """The processors in the order in which transformers' ``generate`` takes them."""
    chain = LogitsProcessorList(
        [RepetitionPenaltyLogitsProcessor(penalty), TemperatureLogitsWarper(temperature)]
    )
    if top_k:
        chain.append(TopKLogitsWarper(top_k))
    if top_p < 1.0:
        chain.append(TopPLogitsWarper(top_p))
    return chain


def sampled_logprobs(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    chain: LogitsProcessorList,
    dropped_BTV: Tensor | None = None,
) -> Tensor:
    """Log-probability [B, T] of every token given those before it; 0 for the first.

    ``dropped_BTV``: True for tokens that cannot be drawn at a position.
    """
    logprobs_BTV = sampled_distributions(logits_BTV, tokens_BT, chain, dropped_BTV)
    return logprobs_BTV.gather(-1, tokens_BT[:, :, None]).squeeze(-1)


def sampled_distributions(
    logits_BTV: Tensor,
    tokens_BT: Tensor,
    chain: LogitsProcessorList,
    dropped_BTV: Tensor | None = None,
) -> Tensor:
    """Log-probabilities [B, T, V] of all tokens at every position given those before it; 0 at the first."""
    columns = [torch.zeros_like(logits_BTV[:, 0])]
    for position in range(1, tokens_BT.shape[1]):
        # Each row with its different tokens: autograd would count what scatter writes twice twice.
        scores = [
            chain(tokens_T[:position].unique()[None], logits_TV[None, position - 1])
            for tokens_T, logits_TV in zip(tokens_BT, logits_BTV, strict=True)
        ]
        scores_BV = torch.cat(scores)
        if dropped_BTV is not None:
            scores_BV = scores_BV.masked_fill(dropped_BTV[:, position], -torch.inf)
        columns.append(scores_BV.log_softmax(dim=-1))
    return torch.stack(columns, dim=1)


def random_kept(
    tokens_BT: Tensor, mask_BT: Tensor, vocabulary: int, share: float
) -> tuple[KeptTokens, Tensor]:
    """A random ``share`` of the vocabulary at every position, with the token that stands there.

    Returns it in the package's form, and as what is dropped [B, T, V]; nothing is dropped off the response.
    """
    generator = torch.Generator().manual_seed(17)
    kept_BTV = torch.rand(*tokens_BT.shape, vocabulary, generator=generator) < share
    kept_BTV.scatter_(-1, tokens_BT[..., None], True)
    dropped_BTV = ~kept_BTV & mask_BT[..., None]
    kept_BTV &= mask_BT[..., None]
    return KeptTokens(kept_BTV.sum(dim=-1), kept_BTV.nonzero()[:, 2].int()), dropped_BTV
