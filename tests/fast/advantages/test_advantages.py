"""Advantages, token rewards and whitening against loops and NumPy."""

from __future__ import annotations

import math
import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.advantages import AdvantageEstimator, build, estimators, token_rewards, whiten
from gapo_mega.types import Experience

M, B, T = 3, 6, 10


def mask_of(spans: list[tuple[int, int]], length: int = T) -> Tensor:
    mask = torch.zeros(len(spans), length, dtype=torch.bool)
    for b, (start, end) in enumerate(spans):
        mask[b, start:end] = True
    return mask


def experience(seed: int, values: bool = True) -> Experience:
    """Responses of every length: to the row's end, one token, none."""
    generator = torch.Generator().manual_seed(seed)
    mask = mask_of([(2, 7), (3, 10), (1, 2), (5, 9), (4, 4), (2, 10)])
    rewards = torch.randn(M, B, T, generator=generator, dtype=torch.float64)
    return Experience(
        tokens_BT=torch.zeros(B, T, dtype=torch.int64),
        response_mask_BT=mask,
        group_B=torch.tensor([7, 2, 7, 2, 2, 7]),  # interleaved, of equal size
        old_logprobs_BT=torch.zeros(B, T),
        ref_logprobs_BT=torch.zeros(B, T),
        scores_MB=torch.randn(M, B, generator=generator, dtype=torch.float64),
        token_rewards_MBT=rewards.masked_fill(~mask, 0.0),
        values_MBT=torch.randn(M, B, T, generator=generator, dtype=torch.float64) if values else None,
        greedy_scores_MB=torch.randn(M, B, generator=generator, dtype=torch.float64),
    )


def filled(result: Experience) -> tuple[Tensor, Tensor]:
    assert result.advantages_MBT is not None
    assert result.returns_MBT is not None
    return result.advantages_MBT, result.returns_MBT


def gae_by_definition(rewards: list[float], values: list[float], gamma: float, lam: float) -> list[float]:
    """A_t = sum_l (gamma lam)^l delta_{t+l}, written out (quadratic, no recursion)."""
    padded = [*values, 0.0]
    deltas = [r + gamma * padded[t + 1] - padded[t] for t, r in enumerate(rewards)]
    return [
        math.fsum((gamma * lam) ** (k - t) * deltas[k] for k in range(t, len(deltas)))
        for t in range(len(deltas))
    ]


@pytest.mark.parametrize(("gamma", "lam"), [(1.0, 0.95), (0.9, 0.8), (0.99, 0.0), (1.0, 1.0), (0.0, 0.5)])
def test_gae_equals_its_definition_per_sequence(gamma: float, lam: float) -> None:
    case = experience(0)
    assert case.values_MBT is not None
    advantages, returns = filled(build("gae", gamma=gamma, lam=lam)(case))
    for m in range(M):
        for b in range(B):
            where = case.response_mask_BT[b]
            values = case.values_MBT[m, b, where].tolist()
            expected = gae_by_definition(case.token_rewards_MBT[m, b, where].tolist(), values, gamma, lam)
            # float64 on both sides, up to 10 terms in another order; atol for terms that cancel.
            assert advantages[m, b, where].tolist() == pytest.approx(expected, rel=1e-12, abs=1e-13)
            targets = [a + v for a, v in zip(expected, values, strict=True)]
            assert returns[m, b, where].tolist() == pytest.approx(targets, rel=1e-12, abs=1e-13)
            assert not bool(advantages[m, b, ~where].any())
            assert not bool(returns[m, b, ~where].any())


def test_gae_with_lambda_one_returns_the_discounted_reward_to_go() -> None:
    case = experience(1)
    _, returns = filled(build("gae", gamma=0.5, lam=1.0)(case))
    rewards = case.token_rewards_MBT[0, 1, 3:10].numpy()
    to_go = [float((rewards[t:] * 0.5 ** np.arange(7 - t)).sum()) for t in range(7)]
    assert returns[0, 1, 3:10].tolist() == pytest.approx(to_go, rel=1e-12)  # float64


def test_gae_is_not_reached_by_what_stands_off_the_response() -> None:
    case = experience(2)
    assert case.values_MBT is not None
    clean = filled(build("gae")(case))
    off = ~case.response_mask_BT
    case.values_MBT.masked_fill_(off, math.nan)
    case.token_rewards_MBT.masked_fill_(off, math.inf)
    for spoilt, expected in zip(filled(build("gae")(case)), clean, strict=True):
        assert torch.equal(spoilt, expected)


def test_gae_without_values_is_refused() -> None:
    with pytest.raises(ValueError, match=r"values_MBT: found none.*critic"):
        build("gae")(experience(0, values=False))


@pytest.mark.parametrize("baseline", ["leave_one_out", "mean"])
@pytest.mark.parametrize("normalize", [False, True])
def test_group_equals_numpy(baseline: str, normalize: bool) -> None:
    case = experience(3, values=False)
    advantages, returns = filled(build("group", baseline=baseline, normalize=normalize)(case))
    total = case.token_rewards_MBT.numpy().sum(axis=2)
    has_tokens = case.response_mask_BT.any(dim=1).numpy()
    score = np.where(has_tokens, case.scores_MB.numpy(), 0.0)
    group = case.group_B.numpy()
    for m in range(M):
        for b in range(B):
            together = group == group[b]
            others = together & (np.arange(B) != b) if baseline == "leave_one_out" else together
            of_score = score[m, b] - score[m, others].mean()
            of_kl = (total - score)[m, b] - (total - score)[m, others].mean()
            if normalize:
                of_score /= score[m, together].std(ddof=1) + 1e-4
            mask = case.response_mask_BT[b]
            # float64; the difference of two sums of size 1 keeps about 13 digits.
            expected = [of_score + of_kl] * int(mask.sum())
            assert advantages[m, b, mask].tolist() == pytest.approx(expected, rel=1e-10)
            assert returns[m, b, mask].tolist() == pytest.approx([total[m, b]] * int(mask.sum()), rel=1e-12)
            assert not bool(advantages[m, b, ~mask].any())


def test_group_of_one_sample_is_refused() -> None:
    case = experience(5, values=False)
    case.group_B[0] = 99
    with pytest.raises(
        ValueError, match=r"samples_per_prompt: 1 of 3 prompts have a single sample.*at least 2"
    ):
        build("group")(case)


def test_token_rewards_equal_a_loop() -> None:
    case = experience(6)
    generator = torch.Generator().manual_seed(6)
    logprobs, reference = (-torch.rand(B, T, generator=generator, dtype=torch.float64) for _ in range(2))
    mask = case.response_mask_BT
    found = token_rewards(case.scores_MB, logprobs, reference, mask, kl_beta=0.05)
    expected = torch.zeros(M, B, T, dtype=torch.float64)
    for m in range(M):
        for b in range(B):
            response = mask[b].nonzero().flatten().tolist()
            for t in response:
                expected[m, b, t] = -0.05 * (logprobs[b, t] - reference[b, t])
            if response:
                expected[m, b, response[-1]] += case.scores_MB[m, b]
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)  # float64, the same two operations


def test_kl_reward_has_the_same_sign_for_every_objective() -> None:
    """A policy more certain than the reference is held back in each objective (+beta, not -beta)."""
    scores = torch.zeros(2, 1)
    logprobs, reference = torch.full((1, 3), -0.1), torch.full((1, 3), -2.0)
    rewards = token_rewards(scores, logprobs, reference, torch.ones(1, 3, dtype=torch.bool), 0.1)
    assert bool((rewards < 0).all())
    assert torch.equal(rewards[0], rewards[1])


def test_token_rewards_pass_over_padding_that_is_not_finite() -> None:
    mask = mask_of([(1, 3)], length=4)
    spoilt = torch.tensor([[math.nan, -1.0, -1.0, -math.inf]])
    rewards = token_rewards(torch.tensor([[2.0]]), spoilt, spoilt, mask, 0.1)
    assert rewards.tolist() == [[[0.0, 0.0, 2.0, 0.0]]]


def test_whitening_over_ranks_equals_numpy_over_everything() -> None:
    generator = torch.Generator().manual_seed(7)
    shift = torch.tensor([0.0, 5.0, -100.0])[:, None, None]
    advantages = torch.randn(M, B, T, generator=generator) * 3 + shift
    mask = experience(7).response_mask_BT
    advantages[:, ~mask] = math.nan
    halves = [slice(0, 2), slice(2, B)]  # two ranks with different numbers of rows and tokens

    slots: list[Tensor] = [torch.empty(0)] * len(halves)
    barrier = threading.Barrier(len(halves))

    def whiten_on(rank: int) -> Tensor:
        def sum_over_data(x: Tensor) -> Tensor:
            slots[rank] = x
            barrier.wait(timeout=60)
            total = slots[0] + slots[1]
            barrier.wait(timeout=60)
            return total

        return whiten(advantages[:, halves[rank]], mask[halves[rank]], sum_over_data)

    with ThreadPoolExecutor(len(halves)) as ranks:
        results = list(ranks.map(whiten_on, range(len(halves))))
    for rows, found in zip(halves, results, strict=True):
        for m in range(M):
            everything = advantages[m, mask].double().numpy()
            expected = (advantages[m, rows].double().numpy() - everything.mean()) / everything.std()
            inside = mask[rows].numpy()
            # The result is rounded to float32.
            assert found[m].numpy()[inside] == pytest.approx(expected[inside], rel=1e-6, abs=1e-7)
            assert not found[m].numpy()[~inside].any()


def test_whitening_a_constant_objective_gives_zero() -> None:
    mask = torch.ones(B, T, dtype=torch.bool)
    advantages = torch.full((M, B, T), 0.1) * (1 + 1e-8)
    assert not bool(whiten(advantages, mask, lambda x: x).any())


@pytest.mark.every("advantages")
def test_every_estimator_of_the_folder_fills_in_finite_advantages(name: str) -> None:
    estimator = build(name)
    assert isinstance(estimator, AdvantageEstimator)
    case = experience(8, values=estimator.needs_values)
    advantages, returns = filled(estimator(case))
    for x in (advantages, returns):
        assert x.shape == (M, B, T)
        assert bool(x.isfinite().all())
        assert not bool(x[:, ~case.response_mask_BT].any())
    assert case.advantages_MBT is None  # the input is left as it was


def test_build_names_the_nearest_name_and_option() -> None:
    with pytest.raises(
        ValueError, match=r"advantages\.name: found 'gea' \(did you mean 'gae'\?\), accepted: gae, group"
    ):
        build("gea")
    with pytest.raises(ValueError, match=r"found 'lambda' \(did you mean '\w+'\?\), accepted: gamma, lam"):
        build("gae", **{"lambda": 0.9})


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("gae", {"gamma": 1.5}, r"gamma: found 1.5"),
        ("gae", {"lam": float("nan")}, r"lam: found nan"),
        ("gae", {"lam": True}, r"lam: found True"),
        ("reinforce_pp", {"gamma": -0.1}, r"gamma: found -0.1, accepted: a number from 0 to 1"),
        ("reinforce_pp", {"gamma": "1"}, r"gamma: found '1'"),
        ("grpo", {"normalize": 1}, r"normalize: found 1, accepted: true, false"),
        ("grpo", {"epsilon": math.nan}, r"epsilon: found nan"),
        ("group", {"baseline": "median"}, r"baseline: found 'median', accepted: leave_one_out, mean"),
        ("group", {"normalize": "yes"}, r"normalize: found 'yes'"),
        ("group", {"epsilon": -1e-6}, r"epsilon: found -1e-06, accepted: a finite number >= 0"),
        ("group", {"epsilon": math.inf}, r"epsilon: found inf"),
        ("group", {"epsilon": True}, r"epsilon: found True"),
        ("group", {"epsilon": "1e-4"}, r"epsilon: found '1e-4'"),
    ],
)
def test_option_values_are_checked(name: str, options: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build(name, **options)


@pytest.mark.every("advantages")
def test_every_estimator_works_with_as_few_samples_as_it_says(name: str) -> None:
    estimator = build(name)
    case = experience(9, values=estimator.needs_values)
    fewest = estimator.least_samples
    advantages, _ = filled(estimator(replace(case, group_B=torch.arange(B) // fewest)))
    assert bool(advantages.isfinite().all())
    if fewest > 1:
        with pytest.raises(ValueError, match=f"accepted: at least {fewest}"):
            estimator(replace(case, group_B=torch.arange(B) // (fewest - 1)))


def test_how_many_samples_estimators_need() -> None:
    assert {name: kind.least_samples for name, kind in estimators().items()} == {
        **{"gae": 1, "group": 2, "grpo": 2, "rloo": 2},
        **{"reinforce_pp": 1, "remax": 1},
    }
