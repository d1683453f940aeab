"""Group advantages where scores hardly differ: the KL reward and rounding are no spread of the scores."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.advantages import build, token_rewards, whiten
from gapo_mega.advantages.rewards import kl_rewards
from gapo_mega.types import Experience

TOKENS = 5


def scored(
    scores: list[list[float]], samples: int, beta: float, seed: int = 0, apart: bool = True
) -> Experience:
    """Whole responses of a run: float32 throughout, groups one after the other."""
    scores_MB = torch.tensor(scores, dtype=torch.float32)
    size = (scores_MB.shape[1], TOKENS)
    generator = torch.Generator().manual_seed(seed)
    old_BT = -torch.rand(size, generator=generator)
    ref_BT = old_BT + 0.3 * torch.randn(size, generator=generator)
    mask_BT = torch.ones(size, dtype=torch.bool)
    return Experience(
        tokens_BT=torch.zeros(size, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.arange(size[0]) // samples,
        old_logprobs_BT=old_BT,
        ref_logprobs_BT=ref_BT,
        scores_MB=scores_MB,
        token_rewards_MBT=token_rewards(scores_MB, old_BT, ref_BT, mask_BT, beta),
        kl_rewards_BT=kl_rewards(old_BT, ref_BT, mask_BT, beta) if apart else None,
    )


def advantages_of(case: Experience, **options: object) -> Tensor:
    """[M, B]; every token of a sequence has the same."""
    found = build("group", **{"normalize": True, "baseline": "mean", **options})(case).advantages_MBT
    assert found is not None and found.dtype == torch.float32
    torch.testing.assert_close(found, found[:, :, :1].expand_as(found), rtol=0, atol=0, equal_nan=True)
    return found[:, :, 0]


def kl_of(case: Experience, beta: float) -> np.ndarray:
    """The KL reward of each sequence [B], in float64."""
    gap = case.ref_logprobs_BT.double() - case.old_logprobs_BT.double()
    return beta * gap.sum(dim=1).numpy()


def trl(scores: np.ndarray, epsilon: float) -> np.ndarray:
    """TRL's ``scale_rewards: group`` (epsilon 1e-4) and verl's GRPO (epsilon 1e-6) for one group."""
    return (scores - scores.mean()) / (scores.std(ddof=1) + epsilon)


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("beta", [1e-9, 1e-3, 0.5])
@pytest.mark.parametrize("score", [0.0, 1.0, -3.0, 0.1, 1 / 3])
def test_equal_scores_leave_the_kl_reward_as_it_is(score: float, beta: float, apart: bool) -> None:
    case = scored([[score] * 4], 4, beta, apart=apart)
    kl = kl_of(case, beta)
    # The KL reward is formed in float32; without it apart, the last token's is rounded beside the score.
    rounding = beta * 1e-6 if apart else beta * 1e-6 + abs(score) * 2.0**-24
    assert advantages_of(case)[0].numpy() == pytest.approx(kl - kl.mean(), rel=1e-5, abs=rounding)


@pytest.mark.parametrize("count", [2, 3, 5, 7, 64])
@pytest.mark.parametrize("epsilon", [0.0, 1e-6, 1e-4])
@pytest.mark.parametrize("score", [0.1, 1e-30, 1e6 + 0.1, -7.3e20])
def test_constant_scores_without_kl_give_exactly_nothing(score: float, epsilon: float, count: int) -> None:
    assert not bool(advantages_of(scored([[score] * count], count, 0.0), epsilon=epsilon).any())


@pytest.mark.parametrize("epsilon", [0.0, 1e-4])
def test_scores_that_differ_by_rounding_alone_are_equal(epsilon: float) -> None:
    next_one = float(np.nextafter(np.float32(0.1), np.float32(1)))
    assert not bool(advantages_of(scored([[0.1, next_one, 0.1, next_one]], 4, 0.0), epsilon=epsilon).any())


@pytest.mark.parametrize("offset", [0.0, 1.0, 1e3, 1e6, -1e6])
@pytest.mark.parametrize("epsilon", [1e-4, 1e-6, 0.0])
@pytest.mark.parametrize("beta", [0.0, 0.05])
def test_scores_with_an_offset_equal_trl_and_verl_beside_the_kl_reward(
    beta: float, epsilon: float, offset: float
) -> None:
    scores = [[offset + x for x in (0.0, 0.25, 2.0, 1.0)], [offset + x for x in (1.0, 0.0, 0.0, 0.5)]]
    case = scored(scores, 4, beta)
    kl = kl_of(case, beta)
    for m in range(2):
        expected = trl(np.array(scores[m]), epsilon) + kl - kl.mean()
        # Every score is a float32 number; what is left is the KL reward's rounding and the result's.
        assert advantages_of(case, epsilon=epsilon)[m].numpy() == pytest.approx(expected, rel=1e-5, abs=1e-6)


def test_the_kl_reward_does_not_grow_where_scores_hardly_differ() -> None:
    case = scored([[0.0, 1e-3, 0.0, 1e-3]], 4, 0.05)
    kl = kl_of(case, 0.05)
    expected = trl(np.array([0.0, 1e-3, 0.0, 1e-3]), 1e-4) + kl - kl.mean()
    # 1e-3 is rounded to float32.
    assert advantages_of(case)[0].numpy() == pytest.approx(expected, rel=1e-5)


@pytest.mark.parametrize("baseline", ["mean", "leave_one_out"])
def test_without_normalising_a_large_score_does_not_swallow_the_kl_reward(baseline: str) -> None:
    case = scored([[1e6] * 4], 4, 0.01)
    kl = kl_of(case, 0.01)
    factor = 4 / 3 if baseline == "leave_one_out" else 1.0
    found = advantages_of(case, normalize=False, baseline=baseline)
    # float32 log-probabilities; a float32 return of 1e6 would be off by 0.06.
    assert found[0].numpy() == pytest.approx(factor * (kl - kl.mean()), rel=1e-5, abs=1e-8)


def test_each_objective_and_group_has_its_own_spread() -> None:
    scores = [[0.0, 0.0, 1.0, 3.0], [5.0, 7.0, 2.0, 2.0]]
    found = advantages_of(scored(scores, 2, 0.0))
    half = math.sqrt(0.5)
    expected = [[0.0, 0.0, -half, half], [-half, half, 0.0, 0.0]]
    # 1e-4 beside spreads of at least sqrt(2).
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


def test_a_score_that_is_not_a_number_stays_in_its_group() -> None:
    found = advantages_of(scored([[0.0, math.nan, 1.0, 3.0]], 2, 0.0))
    assert bool(found[0, :2].isnan().all())
    assert found[0, 2:].tolist() == pytest.approx([-math.sqrt(0.5), math.sqrt(0.5)], rel=1e-4)


def test_differences_beyond_float32_stay_with_their_objective() -> None:
    """They are infinite, which the run tells of; the other objective and the padding are as ever."""
    case = scored([[0.0, 1.0], [3e38, -3e38]], 2, 0.0)
    found = advantages_of(case, normalize=False, baseline="leave_one_out")
    assert found.tolist() == [[-1.0, 1.0], [math.inf, -math.inf]]


def test_a_kl_reward_that_overflows_is_refused_with_its_place() -> None:
    scores, old = torch.zeros(2, 2), torch.zeros(2, 3)
    reference = torch.tensor([[0.0, 0.0, 0.0], [0.0, -math.inf, 0.0]])
    mask = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"algorithm\.kl_beta: found 0\.1.* of token 1 in row 1 is -inf"):
        token_rewards(scores, old, reference, mask, 0.1)
    assert not bool(token_rewards(scores, old, reference, mask, 0.0).any())


@pytest.mark.parametrize("size", [1e-9, 1e-6])
def test_whitening_does_not_blow_up_what_is_far_below_any_score(size: float) -> None:
    """TRL's and verl's masked_whiten, with the variance over all tokens (their n - 1 makes no difference)."""
    noise = size * torch.randn(1, 8, 40, generator=torch.Generator().manual_seed(1))
    mask = torch.ones(8, 40, dtype=torch.bool)
    x = noise.double().numpy()
    expected = (x - x.mean()) / np.sqrt(x.var() + 1e-8)
    found = whiten(noise, mask, lambda total: total).numpy()
    assert found == pytest.approx(expected, rel=1e-6)  # rounded to float32
    assert np.abs(found).max() < 5 * size / 1e-4
