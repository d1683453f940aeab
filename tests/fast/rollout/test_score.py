"""The scorer above a fake engine: what it asks for, and what ranks of a replica tell one another."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.types import Prompt, Rollout
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer
from tests.helpers.scoring import Length, scorer
from tests.helpers.team import Team

PROMPTS = [Prompt(i, f"w{i}", (2 + i, 3)) for i in range(3)]


def rollout(engine: FakeEngine) -> Rollout:
    tokenizer: Any = FakeTokenizer()
    return Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=5)).collect(PROMPTS, 2, 7)


def test_rewards_are_scores_at_the_end_and_the_divergence_before() -> None:
    engine = FakeEngine()
    engine.policy = 4
    batch = rollout(engine)
    experience = scorer(engine, [Length()]).score(batch)
    # By hand: log pi - log pi_ref is -0.003 times the token, and beta is 0.5.
    expected = 0.5 * 0.003 * batch.tokens_BT * batch.response_mask_BT
    for row, response in enumerate(batch.responses):
        expected[row, int(batch.response_mask_BT[row].nonzero().max())] += len(response)
    torch.testing.assert_close(experience.token_rewards_MBT[0], expected)
    assert experience.values_MBT is None
    assert engine.calls == ["generate", "logprobs policy", "logprobs reference"]


def test_log_probabilities_of_the_generator_save_a_pass() -> None:
    engine = FakeEngine()
    batch = rollout(engine)
    experience = scorer(engine, [Length()], with_values=True, old_logprobs="generator").score(batch)
    assert experience.old_logprobs_BT is batch.logprobs_BT
    assert experience.values_MBT is not None
    assert engine.calls == ["generate", "logprobs reference", "values"]


def test_a_response_is_scored_once_a_replica_and_known_to_all_its_ranks() -> None:
    team = Team(world=4, data=2)
    objectives = [[Length("a"), Length("b", model=object())] for _ in team.members]

    def scores_of(engine: Any) -> torch.Tensor:
        batch = rollout(engine)
        return scorer(engine, objectives[engine.layout.rank]).scores(batch.prompts, batch.responses)

    first, *others = team.run(scores_of)
    assert all(torch.equal(first, other) for other in others)
    # A plain function runs on the replica's first rank; a model of the engine's on all, which hold its parts.
    assert [own[0].asked for own in objectives] == [1, 0, 1, 0]
    assert [own[1].asked for own in objectives] == [1, 1, 1, 1]


def test_an_error_on_the_first_rank_is_raised_on_all() -> None:
    """Else the others would wait for its scores for ever."""
    team = Team(world=2, data=1)

    def error_of(engine: Any) -> str:
        batch = rollout(engine)
        with pytest.raises(ValueError, match="no") as caught:
            scorer(engine, [Length("broken", fail=True)]).scores(batch.prompts, batch.responses)
        return str(caught.value)

    assert team.run(error_of) == ["objective 'broken': no"] * 2
