"""What holds for *every* policy loss: the folder is enumerated, a new file is tested at once."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
from torch import Tensor

from gapo_mega.losses import PolicyLoss, build, losses
from gapo_mega.types import Experience

M, B, T = 3, 5, 8
OBJECTIVE = 1


def case(seed: int = 0) -> tuple[Tensor, Experience]:
    """Log-probabilities and a batch in float64: responses of every length, one row without any."""
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mask_BT = torch.zeros(B, T, dtype=torch.bool)
    for b, (start, end) in enumerate([(2, 7), (1, 8), (3, 4), (4, 4), (2, 6)]):
        mask_BT[b, start:end] = True
    logprobs_BT = -normal(B, T).abs() - 0.1
    batch = Experience(
        tokens_BT=torch.randint(0, 50, (B, T), generator=generator),
        response_mask_BT=mask_BT,
        group_B=torch.arange(B) // 2,
        old_logprobs_BT=logprobs_BT + 0.2 * normal(B, T),  # ratios on both sides of a clip
        ref_logprobs_BT=logprobs_BT + 0.2 * normal(B, T),
        scores_MB=normal(M, B),
        token_rewards_MBT=normal(M, B, T) * mask_BT,
        kl_rewards_BT=normal(B, T) * mask_BT,
        values_MBT=normal(M, B, T) * mask_BT,
        advantages_MBT=normal(M, B, T) * mask_BT,
        returns_MBT=normal(M, B, T) * mask_BT,
        greedy_scores_MB=normal(M, B),
    )
    return logprobs_BT, batch


def loss_and_gradient(
    loss: PolicyLoss, logprobs_BT: Tensor, batch: Experience, objective: int = OBJECTIVE
) -> tuple[Tensor, Tensor]:
    leaf_BT = logprobs_BT.clone().requires_grad_()
    value = loss(leaf_BT, batch, objective)
    (gradient_BT,) = torch.autograd.grad(value, leaf_BT)
    return value.detach(), gradient_BT


def with_other_objectives(batch: Experience, factor: float) -> Experience:
    """All that belongs to objectives other than ``OBJECTIVE``, times ``factor``."""
    scale_M = torch.full((M,), factor, dtype=torch.float64)
    scale_M[OBJECTIVE] = 1.0
    changes = {
        field.name: getattr(batch, field.name) * scale_M.view(M, *[1] * (getattr(batch, field.name).ndim - 1))
        for field in dataclasses.fields(batch)
        if "_MB" in field.name
    }
    return dataclasses.replace(batch, **changes)


@pytest.mark.every("losses")
class TestContract:
    def test_it_is_a_finite_scalar_with_a_graph_and_changes_nothing(self, name: str) -> None:
        logprobs_BT, batch = case()
        before_BT, unchanged = logprobs_BT.clone(), batch.select(torch.arange(B))
        loss = build(name)
        assert isinstance(loss, PolicyLoss)
        value, gradient_BT = loss_and_gradient(loss, logprobs_BT, batch)
        assert value.shape == ()
        assert bool(value.isfinite()) and bool(gradient_BT.isfinite().all())
        assert bool(gradient_BT.any())
        assert torch.equal(logprobs_BT, before_BT)
        assert batch.kept is None  # a loss has nothing to do with it
        for name, value in vars(batch).items():
            assert value is None or torch.equal(value, getattr(unchanged, name)), name

    @pytest.mark.parametrize("size", [1, 2, 3])
    def test_it_adds_up_over_microbatches(self, name: str, size: int) -> None:
        """The sum over tokens, not their mean."""
        loss, (logprobs_BT, batch) = build(name), case()
        whole, gradient_BT = loss_and_gradient(loss, logprobs_BT, batch)
        parts = [
            loss_and_gradient(loss, *part)
            for part in zip(logprobs_BT.split(size), batch.split(size), strict=True)
        ]
        # float64; only the order of about 20 additions differs.
        assert float(sum(value for value, _ in parts)) == pytest.approx(float(whole), rel=1e-12)
        joined_BT = torch.cat([gradient for _, gradient in parts])
        torch.testing.assert_close(joined_BT, gradient_BT, rtol=1e-12, atol=0)

    def test_rows_that_are_there_twice_count_twice(self, name: str) -> None:
        loss, (logprobs_BT, batch) = build(name), case()
        once, gradient_BT = loss_and_gradient(loss, logprobs_BT, batch)
        rows = torch.arange(2 * B) % B
        twice, doubled_BT = loss_and_gradient(loss, logprobs_BT[rows], batch.select(rows))
        assert float(twice) == pytest.approx(2 * float(once), rel=1e-12)  # float64, another order
        torch.testing.assert_close(doubled_BT[:B], gradient_BT, rtol=1e-12, atol=0)

    @pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e30])
    def test_masked_positions_add_exactly_nothing_whatever_they_hold(self, name: str, bad: float) -> None:
        loss, (logprobs_BT, batch) = build(name), case()
        clean, clean_gradient_BT = loss_and_gradient(loss, logprobs_BT, batch)
        off_BT = ~batch.response_mask_BT
        spoilt = {
            field.name: value.masked_fill(off_BT, bad)
            for field in dataclasses.fields(batch)
            if field.name.endswith("BT")
            and (value := getattr(batch, field.name)) is not None
            and value.is_floating_point()
        }
        assert {"old_logprobs_BT", "advantages_MBT"} <= set(spoilt)
        value, gradient_BT = loss_and_gradient(
            loss, logprobs_BT.masked_fill(off_BT, bad), dataclasses.replace(batch, **spoilt)
        )
        assert torch.equal(value, clean)
        assert torch.equal(gradient_BT, clean_gradient_BT)
        assert bool((gradient_BT[off_BT] == 0).all())

    @pytest.mark.parametrize("seed", range(3))
    def test_the_gradient_is_that_of_finite_differences(self, name: str, seed: int) -> None:
        loss, (logprobs_BT, batch) = build(name), case(seed)
        if loss.stops_gradient:
            pytest.skip("it says that its gradient is not that of its value; its own tests have the gradient")
        # Central differences over 2e-6 of values near 1 in float64: off by 1e-10 from rounding.
        assert torch.autograd.gradcheck(
            lambda x_BT: loss(x_BT, batch, OBJECTIVE),
            (logprobs_BT.requires_grad_(),),
            eps=1e-6,
            atol=1e-8,
            rtol=1e-6,
        )

    @pytest.mark.parametrize("factor", [-3.0, math.nan])
    def test_it_reads_the_advantages_of_its_objective_only(self, name: str, factor: float) -> None:
        loss, (logprobs_BT, batch) = build(name), case()
        value, gradient_BT = loss_and_gradient(loss, logprobs_BT, batch)
        other, other_gradient_BT = loss_and_gradient(loss, logprobs_BT, with_other_objectives(batch, factor))
        assert torch.equal(value, other) and torch.equal(gradient_BT, other_gradient_BT)
        assert not torch.equal(gradient_BT, loss_and_gradient(loss, logprobs_BT, batch, 0)[1])

    def test_a_batch_without_a_response_token_gives_zero_with_a_graph(self, name: str) -> None:
        logprobs_BT, batch = case()
        nothing = dataclasses.replace(batch, response_mask_BT=torch.zeros(B, T, dtype=torch.bool))
        value, gradient_BT = loss_and_gradient(build(name), logprobs_BT, nothing)
        assert float(value) == 0.0
        assert not bool(gradient_BT.any())


@pytest.mark.parametrize("name", sorted(losses()))
def test_its_name_is_how_it_is_built(name: str) -> None:
    assert build(name).name == name
    with pytest.raises(ValueError, match=rf"loss\.options \({name}\): found 'no_such_option'"):
        build(name, no_such_option=1)


def test_unknown_losses_name_the_nearest() -> None:
    with pytest.raises(
        ValueError, match=r"loss\.name: found 'poo' \(did you mean 'ppo'\?\), accepted: .*ppo"
    ):
        build("poo")


@pytest.mark.parametrize("value", [0, -0.1, math.nan, math.inf, True, "0.1"])
def test_the_clip_of_ppo_is_checked(value: object) -> None:
    with pytest.raises(ValueError, match=rf"clip_epsilon: found {value!r}, accepted: a finite number > 0"):
        build("ppo", clip_epsilon=value)
