"""The experience of a batch of pairs has the gradients of the pairs' own losses."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from gapo_mega.config.supervised import PairLossConfig
from gapo_mega.runs.pair_steps import Pairs, WeightedLogprobs, experience_of, measure

OBJECTIVES, OWN = 3, 4
LOSSES: dict[str, dict[str, Any]] = {
    "dpo": {"beta": 0.4},
    "smoothed": {"beta": 0.4, "label_smoothing": 0.1},
    "by length": {"beta": 2.0, "length_normalized": True},
    "ipo": {"name": "ipo", "beta": 0.3, "length_normalized": True},
}
WEIGHTS = [1.0, 0.3, 0.6]


def random_pairs(generator: torch.Generator) -> Pairs:
    def row() -> tuple[Tensor, Tensor]:
        prompt, answer = (int(n) for n in torch.randint(1, 9, (2,), generator=generator))
        mask_T = torch.arange(prompt + answer) >= prompt
        return torch.randint(3, 50, (prompt + answer,), generator=generator), mask_T

    def margin() -> float:
        return float(torch.randn((), generator=generator))

    return Pairs.of([[((row(), row()), margin()) for _ in range(OWN)] for _ in range(OBJECTIVES)], pad_id=0)


def logprobs(pairs: Pairs, generator: torch.Generator) -> Tensor:
    mask_BT = pairs.batch.response_mask_BT
    return -torch.rand(mask_BT.shape, generator=generator) * 5 * mask_BT


def mean_loss(
    policy_BT: Tensor, reference_BT: Tensor, pairs: Pairs, loss: PairLossConfig, objective: int
) -> Tensor:
    """Of one objective's pairs, one at a time, in float64."""
    total = torch.zeros((), dtype=torch.float64)
    for pair in range(OWN):
        chosen = 2 * (objective * OWN + pair)
        ratios = []
        for row in (chosen, chosen + 1):
            ratio = (policy_BT[row] - reference_BT[row].double()).sum()
            ratios.append(
                ratio / pairs.batch.response_mask_BT[row].sum() if loss.length_normalized else ratio
            )
        logits = ratios[0] - ratios[1]
        if loss.name == "ipo":
            total = total + (logits - 1 / (2 * loss.beta)) ** 2
            continue
        scaled = (loss.beta * logits - float(pairs.margins_MP[objective, pair])) / WEIGHTS[objective]
        total = total - (1 - loss.label_smoothing) * logsigmoid(scaled)
        total = total - loss.label_smoothing * logsigmoid(-scaled)
    return total / OWN


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("ranks", [1, 2])
def test_gradients_are_those_of_the_mean_loss(name: str, ranks: int) -> None:
    """``ranks``: so many that hold pairs of other objectives' order and length."""
    loss = PairLossConfig.model_validate(LOSSES[name])
    generator = torch.Generator().manual_seed(5)
    shares = [random_pairs(generator) for _ in range(ranks)]
    models = [(logprobs(pairs, generator), logprobs(pairs, generator)) for pairs in shares]
    everywhere = torch.tensor(
        [float(OWN * ranks), float(sum(pairs.batch.response_mask_BT.sum() for pairs in shares))],
        dtype=torch.float64,
    )
    for pairs, (policy_BT, reference_BT) in zip(shares, models, strict=True):
        measured = measure(pairs, policy_BT, reference_BT, loss, WEIGHTS)
        own = torch.tensor([OWN, int(pairs.batch.response_mask_BT.sum())], dtype=torch.float64)

        def total(tensor: Tensor, own: Tensor = own) -> Tensor:
            assert torch.equal(tensor, own)
            return everywhere

        experience = experience_of(pairs, measured, policy_BT, reference_BT, total)
        leaf_BT = policy_BT.double().requires_grad_()
        for objective in range(OBJECTIVES):
            expected = mean_loss(leaf_BT, reference_BT, pairs, loss, objective)
            value = float(measured.losses_MP[objective].mean())
            assert value == pytest.approx(float(expected), rel=1e-12)
            (wanted_BT,) = torch.autograd.grad(expected / ranks, leaf_BT)
            wanted_BT = wanted_BT * pairs.batch.response_mask_BT
            surrogate = WeightedLogprobs()(leaf_BT, experience, objective) / everywhere[1]
            (found_BT,) = torch.autograd.grad(surrogate, leaf_BT)
            # Advantages are float32.
            torch.testing.assert_close(found_BT, wanted_BT, rtol=1e-6, atol=1e-12)


def test_facts_of_a_batch() -> None:
    generator = torch.Generator().manual_seed(1)
    pairs = random_pairs(generator)
    policy_BT = logprobs(pairs, generator)
    loss = PairLossConfig(beta=0.2)
    tied = measure(pairs, policy_BT, policy_BT, loss, WEIGHTS).facts()
    assert tied["accuracy"].tolist() == [OWN / 2] * OBJECTIVES
    assert not tied["margin"].any() and not tied["chosen_reward"].any()

    reference_BT = logprobs(pairs, generator)
    facts = measure(pairs, policy_BT, reference_BT, loss, WEIGHTS).facts()
    rewards = 0.2 * (policy_BT - reference_BT).double().sum(dim=1).view(OBJECTIVES, OWN, 2)
    chosen, rejected = rewards.unbind(dim=2)
    torch.testing.assert_close(facts["chosen_reward"], chosen.sum(dim=1))
    torch.testing.assert_close(facts["margin"], (chosen - rejected).sum(dim=1))
    assert facts["accuracy"].tolist() == (chosen > rejected).sum(dim=1).tolist()


def test_the_rows_of_another_objective_are_not_read() -> None:
    generator = torch.Generator().manual_seed(2)
    pairs = random_pairs(generator)
    policy_BT, reference_BT = logprobs(pairs, generator), logprobs(pairs, generator)
    measured = measure(pairs, policy_BT, reference_BT, PairLossConfig(), WEIGHTS)
    experience = experience_of(pairs, measured, policy_BT, reference_BT, lambda t: t)
    assert experience.advantages_MBT is not None
    used_MB = experience.advantages_MBT.abs().sum(dim=2) > 0
    assert torch.equal(used_MB, torch.block_diag(*[torch.ones(1, 2 * OWN)] * OBJECTIVES).bool())
