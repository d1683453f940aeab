"""Logits of transformers, and how far others are from them."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoModelForCausalLM

from gapo_mega.engine.megatron.model.logprobs import Distribution, before_response, logprobs_of
from gapo_mega.types import TokenBatch


@torch.no_grad()
def transformers_logits(directory: Path, tokens_BT: Tensor) -> Tensor:
    logits_BTV: Tensor = AutoModelForCausalLM.from_pretrained(directory).eval()(tokens_BT).logits
    return logits_BTV


def relative_error(found: Tensor, expected: Tensor) -> float:
    assert found.shape == expected.shape
    return float((found - expected).abs().max() / expected.abs().max())


def chosen_logprobs(logits_BTV: Tensor, tokens_BT: Tensor) -> Tensor:
    """The log-probability of every token but the first, [B, T - 1]."""
    return logits_BTV.log_softmax(-1)[:, :-1].gather(-1, tokens_BT[:, 1:, None]).squeeze(-1)


def response_logprobs(logits_BTV: Tensor, batch: TokenBatch, distribution: Distribution) -> Tensor:
    """``logprobs_of`` from logits at all positions, which it leaves as they are."""
    return logprobs_of(before_response(logits_BTV, batch.response_mask_BT), batch, distribution)
