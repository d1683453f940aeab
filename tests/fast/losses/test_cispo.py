"""CISPO: the value and the gradient by their formulas, which are not each other's."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gapo_mega.losses import build
from tests.helpers.policy_batches import arrays, policy_batch, value_and_gradient


@pytest.mark.parametrize(("low", "high"), [(1.0, 4.0), (0.2, 0.3)])
def test_value_and_gradient_equal_numpy(low: float, high: float) -> None:
    logprobs_BT, batch = policy_batch(1, spread=1.5)
    loss = build("cispo", clip_epsilon=low, clip_epsilon_high=high)
    log_ratio_BT, advantages_BT, _ = arrays(logprobs_BT, batch)
    ratio_BT = np.exp(log_ratio_BT)
    inside_BT = batch.response_mask_BT.numpy()
    slope_BT = np.where(inside_BT, -np.clip(ratio_BT, 1 - low, 1 + high) * advantages_BT, 0.0)
    value, gradient_BT = value_and_gradient(loss, logprobs_BT, batch)
    # float64: one product each, and a sum of about 30 terms in another order
    assert value == pytest.approx((slope_BT * logprobs_BT.numpy()).sum(), rel=1e-12)
    assert gradient_BT.numpy() == pytest.approx(slope_BT, rel=1e-12)
    held = loss.clipped(logprobs_BT, batch, 0) & batch.response_mask_BT
    expected = [(inside_BT & (ratio_BT < 1 - low)).sum(), (inside_BT & (ratio_BT > 1 + high)).sum()]
    assert held.sum(dim=(1, 2)).tolist() == expected
    assert expected[1] and bool(expected[0]) == (low < 1)


def test_no_token_loses_its_gradient() -> None:
    logprobs_BT, batch = policy_batch(2, spread=3.0)
    _, gradient_BT = value_and_gradient(build("cispo"), logprobs_BT, batch)
    assert bool((gradient_BT[batch.response_mask_BT] != 0).all())


def test_objectives_with_one_advantage_a_response_have_cotangents_of_rank_one() -> None:
    """So that one pass gives all gradients, whatever is clipped."""
    logprobs_BT, batch = policy_batch(3, spread=3.0, by_token=False)
    _, first_BT = value_and_gradient(build("cispo"), logprobs_BT, batch)
    assert batch.advantages_MBT is not None
    batch.advantages_MBT.mul_(torch.linspace(-2, 3, len(first_BT), dtype=torch.float64)[None, :, None])
    _, second_BT = value_and_gradient(build("cispo"), logprobs_BT, batch)
    for first_T, second_T in zip(first_BT[:-1], second_BT[:-1], strict=True):
        assert int(torch.linalg.matrix_rank(torch.stack([first_T, second_T]))) == 1
