"""Responses as a server gives them, and the ``Generation`` that comes of them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import isfinite
from typing import Any

import torch
from torch import Tensor

from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.types import Generation


@dataclass(frozen=True)
class Response:
    """Tokens of one response, the end-of-sequence token included, and their log-probabilities."""

    tokens: list[int]
    logprobs: list[float]

    @classmethod
    def read(cls, url: str, choice: Mapping[str, Any]) -> Response:
        """That of a choice of vLLM's ``/inference/v1/generate``. Raises ``ServerLost`` for anything else."""
        tokens = choice.get("token_ids")
        try:
            entries = choice["logprobs"]["content"]
            content = [(entry["token_id"], float(entry["logprob"])) for entry in entries]
        except (TypeError, KeyError, ValueError):
            content = []
        if not tokens or not content or not all(isfinite(value) for _, value in content):
            raise ServerLost(f"{url}: found a response without tokens or without log-probabilities")
        if [token for token, _ in content] != tokens:
            raise ServerLost(f"{url}: found log-probabilities of other tokens than the response's")
        return cls(list(tokens), [value for _, value in content])


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
    return Generation(tokens_BT, prompt_B, mask_BT, logprobs_BT, finished_B, versions_B=versions_B)
