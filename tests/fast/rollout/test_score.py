"""The scorer above a fake engine: what it asks for, and what ranks of a replica tell one another."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.types import Prompt, ResponseFacts, Rollout
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


class TwoArguments(Exception):
    """Can be pickled, but not read back."""

    def __init__(self, reason: str, code: int) -> None:
        super().__init__(reason)


class Raises(Length):
    """An objective without the checks of ``ObjectiveKind`` that fails."""

    def __init__(self, error: BaseException) -> None:
        super().__init__("raises")
        self._error = error

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        raise self._error


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (TwoArguments("lost", 3), "lost"),
        (ValueError(lambda: None), "function"),  # cannot be pickled at all
        (SystemExit(0), r"found sys\.exit\(0\)"),
    ],
)
def test_an_error_that_no_pickle_carries_keeps_its_reason_on_every_rank(
    error: BaseException, reason: str
) -> None:
    team = Team(world=2, data=1)

    def error_of(engine: Any) -> str:
        batch = rollout(engine)
        with pytest.raises(Exception, match=reason) as caught:
            scorer(engine, [Raises(error)]).scores(batch.prompts, batch.responses)
        return str(caught.value)

    assert len(team.run(error_of)) == 2


class Fixed(Length):
    """An objective of a user's own, without the checks of ``ObjectiveKind``."""

    def __init__(self, scores: list[Any], model: object | None = None) -> None:
        super().__init__("fixed", model)
        self._scores = scores

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        return self._scores


@pytest.mark.parametrize("model", [None, object()])
@pytest.mark.parametrize(
    ("bad", "shown"),
    [
        (3.5e38, r"3\.5e\+38"),
        (-1e300, r"-1e\+300"),
        (10**60, "10+"),
        (math.inf, "inf"),
        (math.nan, "nan"),
        (None, "None"),
        ("1.0", "'1.0'"),
        ([1.0], r"\[1\.0\]"),
    ],
)
def test_a_score_that_float32_does_not_hold_is_refused_with_objective_row_and_value(
    bad: Any, shown: str, model: object | None
) -> None:
    prompts = [Prompt(7, "a"), Prompt(7, "a"), Prompt(9, "b"), Prompt(9, "b")]
    objectives = [Length(), Fixed([0.0, 1.0, bad, 2.0], model)]
    with pytest.raises(ValueError) as caught:
        scorer(FakeEngine(), objectives).scores(prompts, ["", "x", "y", "z"])
    where = "for response 2, an answer to prompt 9"
    said = rf"objective 'fixed': found the score {shown} {where}, accepted: .*float32"
    assert re.fullmatch(said, str(caught.value))


@pytest.mark.parametrize("model", [None, object()])
def test_a_wrong_number_of_scores_is_refused(model: object | None) -> None:
    prompts = [Prompt(0, "a"), Prompt(0, "a")]
    with pytest.raises(ValueError, match="objective 'fixed': found 3 scores, accepted: 2, one for each"):
        scorer(FakeEngine(), [Length(), Fixed([1.0, 2.0, 3.0], model)]).scores(prompts, ["", ""])


@pytest.mark.parametrize("value", [3.4028234663852886e38, -3e38, 2**100, True, 1e-50])
def test_what_float32_holds_is_taken(value: float) -> None:
    prompts = [Prompt(0, "a")]
    found = scorer(FakeEngine(), [Fixed([value])]).scores(prompts, [""])
    assert found.dtype == torch.float32 and found.shape == (1, 1)
    assert found.item() == torch.tensor(float(value)).item()


def test_the_kl_reward_lies_apart_for_estimators() -> None:
    engine = FakeEngine()
    engine.policy = 4
    batch = rollout(engine)
    experience = scorer(engine, [Length()]).score(batch)
    assert experience.kl_rewards_BT is not None
    expected = 0.5 * 0.003 * batch.tokens_BT * batch.response_mask_BT
    torch.testing.assert_close(experience.kl_rewards_BT, expected)


class Facts(Length):
    """Keeps what it is told of the responses."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        self.facts = facts
        return super().score(prompts, responses, facts)


@pytest.mark.parametrize("model", [None, object()])
def test_objectives_are_told_length_and_end_of_every_response(model: object | None) -> None:
    engine, objective = FakeEngine(), Facts("facts", model)
    batch = replace(rollout(engine), finished_B=torch.tensor([True, False] * 3))
    scorer(engine, [objective]).score(batch)
    assert objective.facts is not None
    # A word of the fake tokenizer is one token, and the end is one more.
    assert objective.facts.token_counts == [len(text.split()) + 1 for text in batch.responses]
    assert objective.facts.finished == [True, False] * 3
