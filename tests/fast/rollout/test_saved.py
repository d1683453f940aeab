"""Generations that went through JSON are the same bit for bit."""

from __future__ import annotations

import json

import pytest
import torch

from gapo_mega.rollout.saved import from_lists, to_lists
from gapo_mega.types import Generation, KeptTokens


@pytest.mark.parametrize("cut", [False, True])
def test_a_generation_comes_back(cut: bool) -> None:
    torch.manual_seed(1)
    prompt_B, end_B = torch.tensor([2, 1, 3]), torch.tensor([5, 7, 4])
    column_T = torch.arange(7)
    mask_BT = (column_T >= prompt_B[:, None]) & (column_T < end_B[:, None])
    counts_BT = torch.randint(1, 4, (3, 7)) * mask_BT
    kept = KeptTokens(counts_BT, torch.randint(0, 9, (int(counts_BT.sum()),), dtype=torch.int32))
    # Values of all sizes: float32 has a shortest decimal form that gives it back.
    logprobs_BT = -torch.rand(3, 7).pow(9) * mask_BT
    finished_B = torch.tensor([True, False, True])
    tokens_BT = torch.randint(0, 2**31, (3, 7))
    before = Generation(
        tokens_BT, prompt_B, mask_BT, logprobs_BT, finished_B, kept if cut else None, torch.tensor([3, 3, 3])
    )
    after = from_lists(json.loads(json.dumps(to_lists(before))))
    for name in ("tokens_BT", "prompt_lengths_B", "response_mask_BT", "logprobs_BT", "finished_B"):
        old, new = getattr(before, name), getattr(after, name)
        assert torch.equal(old, new) and old.dtype == new.dtype, name
    assert after.versions_B is None, "they count changes of another engine"
    assert (after.kept is not None) == cut
    if after.kept is not None:
        assert torch.equal(after.kept.counts_BT, kept.counts_BT)
        assert torch.equal(after.kept.tokens_K, kept.tokens_K)
        assert after.kept.tokens_K.dtype == kept.tokens_K.dtype
