"""Generations as plain lists, for checkpoints: the same bits come back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from gapo_mega.types import Generation, KeptTokens


def to_lists(generation: Generation) -> dict[str, Any]:
    """Everything but the versions, which count changes of an engine that the reader does not have."""
    found = {
        "tokens": generation.tokens_BT.tolist(),
        "prompt_lengths": generation.prompt_lengths_B.tolist(),
        "response_lengths": generation.response_mask_BT.sum(dim=1).tolist(),
        "logprobs": generation.logprobs_BT.tolist(),
        "finished": generation.finished_B.tolist(),
    }
    if generation.kept is not None:
        found["kept_counts"] = generation.kept.counts_BT.tolist()
        found["kept_tokens"] = generation.kept.tokens_K.tolist()
    return found


def from_lists(saved: Mapping[str, Any]) -> Generation:
    """Inverse of ``to_lists``."""
    tokens_BT = torch.tensor(saved["tokens"], dtype=torch.int64)
    prompt_B = torch.tensor(saved["prompt_lengths"], dtype=torch.int64)
    end_B = prompt_B + torch.tensor(saved["response_lengths"], dtype=torch.int64)
    column_T = torch.arange(tokens_BT.shape[1])
    kept = None
    if "kept_counts" in saved:
        kept = KeptTokens(
            torch.tensor(saved["kept_counts"], dtype=torch.int64),
            torch.tensor(saved["kept_tokens"], dtype=torch.int32),
        )
    return Generation(
        tokens_BT,
        prompt_B,
        (column_T >= prompt_B[:, None]) & (column_T < end_B[:, None]),
        torch.tensor(saved["logprobs"], dtype=torch.float32),
        torch.tensor(saved["finished"], dtype=torch.bool),
        kept=kept,
    )
