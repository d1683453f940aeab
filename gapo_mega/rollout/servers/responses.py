"""Responses as a server gives them, and the ``Generation`` that comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import chain
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.types import Generation, KeptTokens

_LEAST = -9999.0  # what vLLM writes for minus infinity, and for NaN


@dataclass(frozen=True)
class Response:
    """Tokens of one response, the end-of-sequence token included, and their log-probabilities.

    ``kept``: with top-k, for every token those that were left to draw from, ascending.
    """

    tokens: list[int]
    logprobs: list[float]
    kept: list[list[int]] | None = None

    @classmethod
    def read(cls, url: str, choice: Mapping[str, Any], shown: int = 0) -> Response | None:
        """That of a choice of vLLM's ``/inference/v1/generate``. Raises ``ServerLost`` for anything else.

        ``shown``: how many likeliest tokens the answer has for every token; 0: the drawn one alone, and no
        ``kept``. None where those that were left to draw from may be more than are shown.
        """
        tokens = choice.get("token_ids")
        try:
            entries = choice["logprobs"]["content"]
            content = [(entry["token_id"], float(entry["logprob"])) for entry in entries]
            kept = [_kept(entry["top_logprobs"]) for entry in entries] if shown else None
        except (TypeError, KeyError, ValueError):
            content, kept = [], None
        if not tokens or not content or not all(isfinite(v) and v > _LEAST for _, v in content):
            raise ServerLost(f"{url}: found a response without tokens or without log-probabilities")
        if [token for token, _ in content] != tokens:
            raise ServerLost(f"{url}: found log-probabilities of other tokens than the response's")
        if kept is not None:
            if any(token not in left for token, left in zip(tokens, kept, strict=True)):
                raise ServerLost(f"{url}: found a token that is none of those left to draw from")
            if any(len(left) >= shown for left in kept):
                return None
        return cls(list(tokens), [value for _, value in content], kept)


def _kept(entries: Sequence[Mapping[str, Any]]) -> list[int]:
    return sorted({int(entry["token_id"]) for entry in entries if float(entry["logprob"]) > _LEAST})


def assemble(
    prompts: Sequence[Sequence[int]],
    responses: Sequence[Response],
    pad_id: int,
    eos_ids: Sequence[int],
    versions_B: Tensor,
) -> Generation:
    """Prompts and responses in right-padded tensors."""
    prompt_B = torch.tensor([len(prompt) for prompt in prompts])
    end_B = prompt_B + torch.tensor([len(response.tokens) for response in responses])
    width = int(end_B.max())
    tokens_BT = torch.full((len(prompts), width), pad_id, dtype=torch.int64)
    logprobs_BT = torch.zeros(len(prompts), width)
    for row, (prompt, response) in enumerate(zip(prompts, responses, strict=True)):
        start, end = len(prompt), int(end_B[row])
        tokens_BT[row, :end] = torch.tensor([*prompt, *response.tokens])
        logprobs_BT[row, start:end] = torch.tensor(response.logprobs)
    column_T = torch.arange(width)
    mask_BT = (column_T >= prompt_B[:, None]) & (column_T < end_B[:, None])
    finished_B = torch.tensor([response.tokens[-1] in eos_ids for response in responses])
    kept = _kept_tokens([response.kept for response in responses], mask_BT)
    return Generation(tokens_BT, prompt_B, mask_BT, logprobs_BT, finished_B, kept, versions_B)


def _kept_tokens(rows: Sequence[list[list[int]] | None], mask_BT: Tensor) -> KeptTokens | None:
    """In the order of rows and positions; None without top-k."""
    left = [tokens for row in rows if row is not None for tokens in row]
    if not left:
        return None
    counts_BT = torch.zeros(mask_BT.shape, dtype=torch.int64)
    counts_BT[mask_BT] = torch.tensor([len(tokens) for tokens in left])
    return KeptTokens(counts_BT, torch.tensor(list(chain.from_iterable(left)), dtype=torch.int32))
