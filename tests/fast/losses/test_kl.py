"""Estimates of the KL and their gradients, in the mean over every token of a small vocabulary."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from typing import get_args

import pytest
import torch
from torch import Tensor

from gapo_mega.losses.kl import KlEstimator, kl_estimates
from gapo_mega.types import Experience

VOCABULARY = 7
ESTIMATORS: tuple[KlEstimator, ...] = get_args(KlEstimator)


def batch_of(reference_BT: Tensor, mask_BT: Tensor) -> Experience:
    rows, columns = mask_BT.shape
    empty = torch.zeros(1, rows, columns)
    return Experience(
        tokens_BT=torch.zeros(rows, columns, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.zeros(rows, dtype=torch.int64),
        old_logprobs_BT=torch.zeros(rows, columns),
        ref_logprobs_BT=reference_BT,
        scores_MB=empty[:, :, 0],
        token_rewards_MBT=empty,
    )


@pytest.fixture
def logits() -> Iterator[tuple[Tensor, Tensor]]:
    """Of a policy and of a reference, far apart: their KL is about 1."""
    generator = torch.Generator().manual_seed(3)
    policy, reference = torch.randn(2, VOCABULARY, dtype=torch.float64, generator=generator)
    yield policy.requires_grad_(), reference


def one_of_every_token(logits: Tensor, reference: Tensor, estimator: KlEstimator) -> tuple[Tensor, Tensor]:
    """The estimate for every token [V], and the probability with which the policy draws it."""
    batch = batch_of(reference.log_softmax(0)[:, None], torch.ones(VOCABULARY, 1, dtype=torch.bool))
    logprobs = logits.log_softmax(0)
    return kl_estimates(estimator, logprobs[:, None], batch).squeeze(1), logprobs.exp().detach()


def divergence(one: Tensor, other: Tensor) -> Tensor:
    """``KL(softmax(one) || softmax(other))``, summed over the vocabulary."""
    return (one.softmax(0) * (one.log_softmax(0) - other.log_softmax(0))).sum()


@pytest.mark.parametrize("estimator", ["k1", "k3"])
def test_two_values_are_the_kl_in_the_mean(logits: tuple[Tensor, Tensor], estimator: KlEstimator) -> None:
    estimates, drawn = one_of_every_token(*logits, estimator)
    assert (drawn * estimates).sum().item() == pytest.approx(divergence(*logits).item(), rel=1e-12)


def test_k2_is_near_the_kl_for_policies_near_the_reference() -> None:
    generator = torch.Generator().manual_seed(1)
    reference = torch.randn(VOCABULARY, dtype=torch.float64, generator=generator)
    near = reference + 1e-3 * torch.randn(VOCABULARY, dtype=torch.float64, generator=generator)
    estimates, drawn = one_of_every_token(near, reference, "k2")
    assert float((drawn * estimates).sum()) == pytest.approx(float(divergence(near, reference)), rel=1e-2)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_gradients_in_the_mean(logits: tuple[Tensor, Tensor], estimator: KlEstimator) -> None:
    """With samples held fixed: 0, the gradient of KL(pi || ref), and that of KL(ref || pi)."""
    policy, reference = logits
    estimates, drawn = one_of_every_token(policy, reference, estimator)
    (found,) = torch.autograd.grad((drawn * estimates).sum(), policy)
    (of_reverse,) = torch.autograd.grad(divergence(policy, reference), policy)
    (of_forward,) = torch.autograd.grad(divergence(reference, policy), policy)
    expected = {"k1": torch.zeros_like(policy), "k2": of_reverse, "k3": of_forward}[estimator]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)
    # They are different directions, so that a test of one would not pass for another.
    assert float(torch.nn.functional.cosine_similarity(of_reverse, of_forward, dim=0)) < 0.99


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_off_the_response_nothing_counts(estimator: KlEstimator, bad: float) -> None:
    mask_BT = torch.tensor([[False, True, True], [False, True, False]])
    generator = torch.Generator().manual_seed(2)
    logprobs_BT = -torch.rand(2, 3, generator=generator)
    reference_BT = -torch.rand(2, 3, generator=generator)

    def value_and_gradient(logprobs_BT: Tensor, reference_BT: Tensor) -> tuple[Tensor, Tensor]:
        logprobs_BT = logprobs_BT.clone().requires_grad_()
        estimates_BT = kl_estimates(estimator, logprobs_BT, batch_of(reference_BT, mask_BT))
        estimates_BT.sum().backward()
        assert logprobs_BT.grad is not None
        return estimates_BT.detach(), logprobs_BT.grad

    clean = value_and_gradient(logprobs_BT * mask_BT, reference_BT * mask_BT)
    found = value_and_gradient(
        torch.where(mask_BT, logprobs_BT, bad), torch.where(mask_BT, reference_BT, -bad)
    )
    for mine, expected in zip(found, clean, strict=True):
        assert torch.equal(mine, expected)
        assert bool((mine[~mask_BT] == 0).all())


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_a_token_that_only_the_reference_likes_gives_finite_numbers(estimator: KlEstimator) -> None:
    mask_BT = torch.ones(1, 1, dtype=torch.bool)
    logprobs_BT = torch.tensor([[-1000.0]], requires_grad=True)
    estimates_BT = kl_estimates(estimator, logprobs_BT, batch_of(torch.zeros(1, 1), mask_BT))
    estimates_BT.sum().backward()
    assert bool(estimates_BT.isfinite().all())
    assert logprobs_BT.grad is not None and bool(logprobs_BT.grad.isfinite().all())


def test_it_reads_nothing_of_the_objectives() -> None:
    """So it is one row, or one term, for all of them."""
    mask_BT = torch.ones(1, 2, dtype=torch.bool)
    batch = batch_of(torch.full((1, 2), -0.5), mask_BT)
    other = dataclasses.replace(batch, scores_MB=torch.full((1, 1), math.nan))
    logprobs_BT = torch.full((1, 2), -1.0)
    assert torch.equal(kl_estimates("k3", logprobs_BT, batch), kl_estimates("k3", logprobs_BT, other))
