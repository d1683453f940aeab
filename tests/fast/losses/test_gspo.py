"""GSPO against NumPy: one ratio for a response."""

from __future__ import annotations

import numpy as np
import pytest

from gapo_mega.losses import build
from tests.helpers.policy_batches import arrays, policy_batch, value_and_gradient


@pytest.mark.parametrize("by_token", [False, True])
def test_value_gradient_and_clipped_tokens_equal_numpy(by_token: bool) -> None:
    logprobs_BT, batch = policy_batch(1, spread=0.5, by_token=by_token)
    loss = build("gspo", clip_epsilon=0.05, clip_epsilon_high=0.08)
    log_ratio_BT, advantages_BT, columns = arrays(logprobs_BT, batch)
    expected, slope_BT, held = 0.0, np.zeros_like(log_ratio_BT), [0, 0]
    for b, row in enumerate(columns):
        if not row:
            continue
        s = np.exp(log_ratio_BT[b, row].mean())
        a = advantages_BT[b, row]
        kept = np.minimum(s * a, np.clip(s, 0.95, 1.08) * a)
        expected -= kept.mean()
        # d s / d log pi_t = s / |o|, for every token t of the response
        slope_BT[b, row] = -(s * a * (kept == s * a)).mean() / len(row)
        held[0] += int(((s < 0.95) & (a < 0)).sum())
        held[1] += int(((s > 1.08) & (a > 0)).sum())
    value, gradient_BT = value_and_gradient(loss, logprobs_BT, batch)
    # float64: sums of about 30 terms in another order
    assert value == pytest.approx(expected, rel=1e-12)
    assert gradient_BT.numpy() == pytest.approx(slope_BT, rel=1e-12, abs=1e-16)
    assert loss.clipped(logprobs_BT, batch, 0).sum(dim=(1, 2)).tolist() == held
    assert sum(held)


def test_the_defaults_are_the_papers() -> None:
    loss = build("gspo")
    assert vars(loss) == {
        "clip_epsilon": 3e-4,
        "clip_epsilon_high": 4e-4,
        "normalization": "sequence_mean",
    }
