"""The policy and value losses against plain loops over Python floats."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gapo_mega.losses import Ppo, value_loss_sum
from gapo_mega.losses.statistics import policy_statistics
from gapo_mega.types import Experience

EPSILON = 0.2
VALUE_CLIP = 0.5

ppo = Ppo(clip_epsilon=EPSILON)


def ragged_mask(batch: int, length: int) -> Tensor:
    """Responses in the middle of the row, of different lengths, the last row without any."""
    mask = torch.zeros(batch, length, dtype=torch.bool)
    for b in range(batch - 1):
        mask[b, 1 + b % 3 : length - b] = True
    return mask


def batch_of(old: Tensor, advantages: Tensor, mask: Tensor) -> Experience:
    """A batch of one objective."""
    rows = old.shape[0]
    return Experience(
        tokens_BT=torch.zeros_like(mask, dtype=torch.int64),
        response_mask_BT=mask,
        group_B=torch.arange(rows),
        old_logprobs_BT=old,
        ref_logprobs_BT=torch.zeros_like(old),
        scores_MB=torch.zeros(1, rows),
        token_rewards_MBT=torch.zeros(1, *mask.shape),
        advantages_MBT=advantages[None],
    )


def ppo_loss(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> Tensor:
    return ppo(new, batch_of(old, advantages, mask), 0)


def clip(x: float, low: float, high: float) -> float:
    return min(max(x, low), high)


def policy_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    new = -torch.rand(4, 9, generator=generator, dtype=torch.float64)
    # Wide enough that both sides of the clip are hit, with advantages of either sign.
    old = new + 0.4 * torch.randn(4, 9, generator=generator, dtype=torch.float64)
    return new, old, torch.randn(4, 9, generator=generator, dtype=torch.float64), ragged_mask(4, 9)


def policy_loop(new: Tensor, old: Tensor, advantages: Tensor, mask: Tensor) -> tuple[float, int, float]:
    loss, clipped, kl = 0.0, 0, 0.0
    for b, t in mask.nonzero().tolist():
        ratio = math.exp(float(new[b, t]) - float(old[b, t]))
        advantage = float(advantages[b, t])
        free, held = ratio * advantage, clip(ratio, 1 - EPSILON, 1 + EPSILON) * advantage
        loss -= min(free, held)
        clipped += held < free
        kl += ratio - 1 - math.log(ratio)
    return loss, clipped, kl


@pytest.mark.parametrize("seed", range(5))
def test_policy_loss_and_statistics_equal_a_loop(seed: int) -> None:
    case = policy_case(seed)
    loss, clipped, kl = policy_loop(*case)
    statistics = policy_statistics(ppo, case[0], batch_of(*case[1:]), 1)
    assert 0 < clipped < int(case[3].sum())  # both branches are in the case
    # Both sides are float64; only the order of about 20 additions differs.
    assert float(ppo_loss(*case)) == pytest.approx(loss, rel=1e-12)
    assert int(statistics.clipped_MC.sum()) == clipped
    assert float(statistics.kl) == pytest.approx(kl, rel=1e-12)
    assert int(statistics.tokens) == int(case[3].sum())


def test_policy_gradient_is_the_derivative_of_the_loss_and_zero_where_clipped() -> None:
    new, old, advantages, mask = policy_case(0)
    new.requires_grad_()
    (gradient,) = torch.autograd.grad(ppo_loss(new, old, advantages, mask), new)
    ratio = (new.detach() - old).exp()
    held = ((ratio > 1 + EPSILON) & (advantages > 0)) | ((ratio < 1 - EPSILON) & (advantages < 0))
    expected = torch.where(held | ~mask, torch.zeros_like(ratio), -ratio * advantages)
    # float64 on both sides, one product each.
    torch.testing.assert_close(gradient, expected, rtol=1e-12, atol=0)


def test_at_the_sampling_policy_the_gradient_is_that_of_reinforce() -> None:
    new, _, advantages, mask = policy_case(1)
    leaf = new.clone().requires_grad_()
    (gradient,) = torch.autograd.grad(ppo_loss(leaf, new, advantages, mask), leaf)
    torch.testing.assert_close(gradient, -advantages * mask, rtol=1e-12, atol=0)


def test_masked_positions_add_exactly_nothing_even_when_not_finite() -> None:
    new, old, advantages, mask = policy_case(2)
    leaf = new.clone().requires_grad_()
    clean = ppo_loss(leaf, old, advantages, mask)
    (clean_gradient,) = torch.autograd.grad(clean, leaf)

    bad = math.nan, math.inf, -math.inf
    spoilt = [x.masked_fill(~mask, value) for x, value in zip((new, old, advantages), bad, strict=True)]
    leaf = spoilt[0].requires_grad_()
    loss = ppo_loss(leaf, spoilt[1], spoilt[2], mask)
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert torch.equal(loss, clean)
    assert torch.equal(gradient, clean_gradient)
    assert bool((gradient[~mask] == 0).all())
    assert bool(policy_statistics(ppo, spoilt[0], batch_of(*spoilt[1:], mask), 1).kl.isfinite())


def test_a_ratio_outside_float32_gives_a_finite_gradient() -> None:
    new = torch.tensor([[0.0, -1.0]], requires_grad=True)
    old = torch.tensor([[-200.0, -1.0]])  # exp(200) is Inf in float32
    loss = ppo_loss(new, old, torch.ones(1, 2), torch.ones(1, 2, dtype=torch.bool))
    (gradient,) = torch.autograd.grad(loss, new)
    # The first token is clipped from above (no gradient), the second is at ratio 1.
    assert gradient.tolist() == [[0.0, -1.0]]
    assert float(loss.detach()) == pytest.approx(-(1 + EPSILON) - 1, rel=1e-6)  # float32


def test_no_response_token_at_all_gives_zero_with_a_graph() -> None:
    new, old, advantages, mask = policy_case(3)
    leaf = new.requires_grad_()
    loss = ppo_loss(leaf, old, advantages, torch.zeros_like(mask))
    (gradient,) = torch.autograd.grad(loss, leaf)
    assert float(loss.detach()) == 0.0
    assert not bool(gradient.any())


def value_case(seed: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    values, old, returns = (torch.randn(3, 4, 9, generator=generator, dtype=torch.float64) for _ in range(3))
    return values, old, returns, ragged_mask(4, 9)


@pytest.mark.parametrize("seed", range(5))
def test_value_loss_equals_a_loop(seed: int) -> None:
    values, old, returns, mask = value_case(seed)
    per_objective = [0.0] * 3
    for m in range(3):
        for b, t in mask.nonzero().tolist():
            v, v_old, target = (float(x[m, b, t]) for x in (values, old, returns))
            held = v_old + clip(v - v_old, -VALUE_CLIP, VALUE_CLIP)
            per_objective[m] += 0.5 * max((v - target) ** 2, (held - target) ** 2)
    total = float(value_loss_sum(values, old, returns, mask, VALUE_CLIP))
    assert total == pytest.approx(sum(per_objective), rel=1e-12)  # float64, another order of addition
    for m in range(3):
        one = float(value_loss_sum(values[m], old[m], returns[m], mask, VALUE_CLIP))
        assert one == pytest.approx(per_objective[m], rel=1e-12)


def test_value_loss_ignores_what_stands_at_masked_positions() -> None:
    values, old, returns, mask = value_case(0)
    clean = value_loss_sum(values, old, returns, mask, VALUE_CLIP)
    leaf = values.masked_fill(~mask, math.nan).requires_grad_()
    spoilt = value_loss_sum(
        leaf, old.masked_fill(~mask, math.inf), returns.masked_fill(~mask, math.nan), mask, VALUE_CLIP
    )
    (gradient,) = torch.autograd.grad(spoilt, leaf)
    assert torch.equal(spoilt.detach(), clean)
    assert bool(gradient.isfinite().all())
    assert bool((gradient[:, ~mask] == 0).all())


def test_value_gradient_vanishes_where_the_clip_holds_the_value_on_the_worse_side() -> None:
    # Moved by 1 towards the return 3: the clipped error (2.5) is larger than the free one (2).
    values = torch.tensor([[[1.0]]], requires_grad=True)
    zeros, mask = torch.zeros(1, 1, 1), torch.ones(1, 1, dtype=torch.bool)
    loss = value_loss_sum(values, zeros, zeros + 3.0, mask, VALUE_CLIP)
    (gradient,) = torch.autograd.grad(loss, values)
    assert float(loss.detach()) == 0.5 * 2.5**2
    assert float(gradient) == 0.0
