"""What is logged of an update, against NumPy."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gapo_mega.losses import build
from gapo_mega.losses.statistics import policy_statistics
from tests.helpers.policy_batches import arrays, policy_batch


def test_sums_and_extremes_equal_numpy() -> None:
    logprobs_BT, batch = policy_batch(1)
    log_ratio_BT, _, _ = arrays(logprobs_BT, batch)
    inside = batch.response_mask_BT.numpy()
    log_ratio = log_ratio_BT[inside]
    found = policy_statistics(build("ppo"), logprobs_BT.requires_grad_(), batch, 1)
    # float64: about 30 additions in another order
    assert float(found.kl) == pytest.approx((np.exp(log_ratio) - 1 - log_ratio).sum(), rel=1e-12)
    assert float(found.surprisal) == pytest.approx(-logprobs_BT.detach().numpy()[inside].sum(), rel=1e-12)
    assert float(found.tokens) == inside.sum()
    assert float(found.least_log_ratio) == log_ratio.min()
    assert float(found.greatest_log_ratio) == log_ratio.max()
    assert not any(value.requires_grad for value in vars(found).values())


def test_clipped_tokens_are_counted_for_each_objective() -> None:
    logprobs_BT, batch = policy_batch(2)
    assert batch.advantages_MBT is not None
    both = torch.cat([batch.advantages_MBT, -batch.advantages_MBT])
    loss = build("ppo", clip_epsilon=0.1, clip_epsilon_high=0.3)
    batch = policy_batch(2)[1]
    found = policy_statistics(
        loss, logprobs_BT, type(batch)(**{**vars(batch), "advantages_MBT": both}), objectives=2
    )
    ratio = torch.exp(logprobs_BT - batch.old_logprobs_BT)[batch.response_mask_BT]
    for k, sign in enumerate((1.0, -1.0)):
        a = sign * both[0][batch.response_mask_BT]
        expected = [int(((ratio < 0.9) & (a < 0)).sum()), int(((ratio > 1.3) & (a > 0)).sum())]
        assert found.clipped_MC[k].tolist() == expected
    assert bool((found.clipped_MC > 0).all())


def test_a_plain_function_and_a_batch_without_tokens() -> None:
    logprobs_BT, batch = policy_batch(3)
    batch.response_mask_BT.zero_()
    found = policy_statistics(lambda x, _, __: x.sum(), logprobs_BT * math.nan, batch, 2)
    assert found.clipped_MC.shape == (2, 0)
    assert float(found.kl) == float(found.surprisal) == float(found.tokens) == 0.0
    assert float(found.least_log_ratio) == math.inf and float(found.greatest_log_ratio) == -math.inf
