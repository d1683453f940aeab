"""PPO's bounds against NumPy, and the losses that are PPO with other defaults."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from gapo_mega.losses import build
from tests.helpers.policy_batches import arrays, policy_batch, value_and_gradient

# All in float64: sums of about 30 terms in another order.
TOLERANCE = 1e-12


@pytest.mark.parametrize("high", [None, 0.1, 0.6])
@pytest.mark.parametrize("dual", [None, 1.5, 2.0])
def test_lower_upper_and_dual_clip_equal_numpy(high: float | None, dual: float | None) -> None:
    logprobs_BT, batch = policy_batch(1, spread=1.2)
    loss = build("ppo", clip_epsilon=0.2, clip_epsilon_high=high, dual_clip=dual)
    log_ratio_BT, advantages_BT, columns = arrays(logprobs_BT, batch)
    expected, slope_BT, counts = 0.0, np.zeros_like(log_ratio_BT), dict.fromkeys(("low", "high", "dual"), 0)
    for b, row in enumerate(columns):
        for t in row:
            rho, a = math.exp(log_ratio_BT[b, t]), advantages_BT[b, t]
            bound = 1 + (0.2 if high is None else high)
            kept = min(rho * a, min(max(rho, 0.8), bound) * a)
            moves = kept == rho * a
            counts["low"] += rho < 0.8 and a < 0
            counts["high"] += rho > bound and a > 0
            if dual is not None and a < 0:
                counts["dual"] += rho > dual
                moves = moves and kept > dual * a
                kept = max(kept, dual * a)
            expected -= kept
            slope_BT[b, t] = -rho * a if moves else 0.0
    value, gradient_BT = value_and_gradient(loss, logprobs_BT, batch)
    assert value == pytest.approx(expected, rel=TOLERANCE)
    assert gradient_BT.numpy() == pytest.approx(slope_BT, rel=TOLERANCE)
    names = ("low", "high") if dual is None else ("low", "high", "dual")
    assert loss.clips == names
    held = loss.clipped(logprobs_BT, batch, 0)
    assert dict(zip(names, held.sum(dim=(1, 2)).tolist(), strict=True)) == {n: counts[n] for n in names}
    assert all(counts[name] for name in names)  # the case has every kind
    assert not bool(held[:, ~batch.response_mask_BT].any())


def test_a_higher_bound_of_its_own_leaves_the_lower_one() -> None:
    logprobs_BT, batch = policy_batch(2)
    plain = build("ppo", clip_epsilon=0.2).clipped(logprobs_BT, batch, 0)
    higher = build("ppo", clip_epsilon=0.2, clip_epsilon_high=0.28).clipped(logprobs_BT, batch, 0)
    assert torch.equal(plain[0], higher[0])
    assert bool((plain[1] >= higher[1]).all()) and not torch.equal(plain[1], higher[1])


@pytest.mark.parametrize(("name", "normalization"), [("grpo", "sequence_mean"), ("dr_grpo", "fixed_length")])
def test_grpo_and_dr_grpo_are_ppo_with_other_defaults(name: str, normalization: str) -> None:
    logprobs_BT, batch = policy_batch(3)
    ppo = build("ppo", clip_epsilon=0.2, normalization=normalization)
    loss = build(name)
    assert loss.normalization == normalization
    assert value_and_gradient(loss, logprobs_BT, batch)[0] == value_and_gradient(ppo, logprobs_BT, batch)[0]


@pytest.mark.parametrize(
    ("option", "value", "accepted"),
    [
        ("clip_epsilon_high", 0, "a finite number > 0"),
        ("clip_epsilon_high", math.inf, "a finite number > 0"),
        ("clip_epsilon_high", True, "a finite number > 0"),
        ("dual_clip", 1, "a finite number > 1"),
        ("dual_clip", math.nan, "a finite number > 1"),
        ("dual_clip", "3", "a finite number > 1"),
        ("normalization", "mean", "token_mean, sequence_mean, fixed_length"),
        ("normalization", None, "token_mean, sequence_mean, fixed_length"),
        ("normalization", ["token_mean"], "token_mean, sequence_mean, fixed_length"),
    ],
)
@pytest.mark.parametrize("name", ["ppo", "grpo", "dr_grpo"])
def test_options_are_checked(name: str, option: str, value: object, accepted: str) -> None:
    with pytest.raises(ValueError) as raised:
        build(name, **{option: value})
    message = str(raised.value)
    assert message == f"loss.options ({name}): {option}: found {value!r}, accepted: {accepted}"
