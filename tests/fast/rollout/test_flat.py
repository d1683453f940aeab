"""Prompts without a difference among their samples: found, counted, and left out."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega.advantages import build
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.experience import ExperienceMaker
from gapo_mega.rollout.flat import flat_counts, without_flat
from gapo_mega.types import Experience, KeptTokens, Prompt
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer
from tests.helpers.scoring import Length, no_time, scorer

# Two objectives, three prompts of two samples, interleaved: flat in both, in the first alone, in none.
GROUP_B = torch.tensor([0, 1, 2, 0, 1, 2])
SCORES_MB = torch.tensor([[1.0, 5.0, 0.0, 1.0, 5.0, 1.0], [2.0, 0.0, 3.0, 2.0, 1.0, 4.0]])


def experience(scores_MB: Tensor = SCORES_MB) -> Experience:
    mask_BT = torch.tensor([[False, True, True]]).repeat(6, 1)
    counts_BT = torch.tensor([[0, 1, 2]]).repeat(6, 1)
    return Experience(
        tokens_BT=torch.zeros(6, 3, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=GROUP_B,
        old_logprobs_BT=torch.zeros(6, 3),
        ref_logprobs_BT=torch.zeros(6, 3),
        scores_MB=scores_MB,
        token_rewards_MBT=torch.zeros(2, 6, 3),
        kept=KeptTokens(counts_BT, torch.arange(6, dtype=torch.int32).repeat_interleave(3)),
    )


def test_only_prompts_that_are_flat_in_every_objective_are_left_out() -> None:
    case = experience()
    found = without_flat(case)
    assert found.response_mask_BT.any(dim=1).tolist() == [False, True, True, False, True, True]
    assert torch.equal(found.response_mask_BT[1], case.response_mask_BT[1])
    assert bool(case.response_mask_BT[0].any())  # the input is left as it was
    assert found.batch_size == 6  # all ranks keep equally many rows
    assert found.kept is not None
    assert found.kept.counts_BT.sum(dim=1).tolist() == [0, 3, 3, 0, 3, 3]
    assert found.kept.tokens_K.tolist() == [row for row in (1, 2, 4, 5) for _ in range(3)]


def test_scores_that_are_equal_up_to_rounding_are_flat() -> None:
    third = torch.tensor(1 / 3)
    noisy_MB = SCORES_MB.clone()
    noisy_MB[:, [0, 3]] = torch.stack([third, third * (1 + 1e-7)])
    assert not bool(without_flat(experience(noisy_MB)).response_mask_BT[[0, 3]].any())
    noisy_MB[0, 3] += 1e-4
    assert bool(without_flat(experience(noisy_MB)).response_mask_BT.any(dim=1).all())


def test_flat_prompts_are_counted_by_objective_over_all_ranks() -> None:
    class TwoRanks(FakeEngine):
        def sum_over_data(self, tensor: Tensor) -> Tensor:
            return tensor * 2  # the other rank has the same

    assert flat_counts(TwoRanks(), ["a", "b"], experience()) == {
        "flat_groups/a": 4.0,
        "flat_groups/b": 2.0,
        "flat_in_every_objective": 2.0,
    }


class FirstPromptIsFlat(Length):
    def score(self, prompts: Any, responses: Any) -> list[float]:
        return [0.5 if prompt.index == 0 else float(i) for i, prompt in enumerate(prompts)]


def made(estimator: str, filtered: bool, whitened: bool = False) -> tuple[Experience, dict[str, float]]:
    engine, tokenizer = FakeEngine(), FakeTokenizer()
    objectives = [FirstPromptIsFlat("first"), FirstPromptIsFlat("second")]
    parts: Any = (
        engine,
        Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=4)),  # type: ignore[arg-type]
        scorer(engine, objectives, kl_beta=0.1),
        build(estimator),
        ["first", "second"],
    )
    maker = ExperienceMaker(*parts, samples=2, whitened=whitened, filtered=filtered, timer=no_time)
    found, facts = maker.make([Prompt(0, "w0", (2,)), Prompt(1, "w1", (3,))], seed=1)
    return found, {**facts.extra, "tokens": facts.tokens, "kl": facts.kl}


@pytest.mark.parametrize("estimator", ["group", "grpo", "rloo"])
def test_a_prompt_that_was_left_out_has_no_advantage_and_the_facts_still_count_it(estimator: str) -> None:
    all_of_it, facts = made(estimator, filtered=False)
    found, same_facts = made(estimator, filtered=True)
    assert same_facts == facts and facts["flat_groups/first"] == facts["flat_in_every_objective"] == 1.0
    assert found.advantages_MBT is not None and all_of_it.advantages_MBT is not None
    assert not bool(found.response_mask_BT[:2].any()) and not bool(found.advantages_MBT[:, :2].any())
    assert bool(found.response_mask_BT[2:].any())
    assert torch.equal(found.advantages_MBT[:, 2:], all_of_it.advantages_MBT[:, 2:])


def test_whitening_is_over_what_is_left() -> None:
    found, _ = made("group", filtered=True, whitened=True)
    assert found.advantages_MBT is not None
    tokens = found.advantages_MBT[:, found.response_mask_BT].double()
    # float32; 1e-8 is added to the variance
    torch.testing.assert_close(tokens.mean(dim=1), torch.zeros(2).double(), rtol=0, atol=1e-6)
    torch.testing.assert_close(tokens.std(dim=1, correction=0), torch.ones(2).double(), rtol=1e-5, atol=0)


def test_a_batch_that_is_flat_altogether_is_left_out_altogether() -> None:
    flat = replace(experience(), scores_MB=torch.ones(2, 6))
    assert not bool(without_flat(flat).response_mask_BT.any())
