"""Batches of answers above an engine without a model."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.evaluation.answers import Answer
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.response_scores import ResponseScorer
from gapo_mega.runs.answering import BatchAnswerer, Divergence, Manner, batches
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer
from tests.helpers.fake_runs import PROMPTS
from tests.helpers.scoring import Length
from tests.helpers.team import Member, Team


def answerer(
    engine: FakeEngine, *objectives: Length, divergence: Divergence = "measured", greedy: bool = False
) -> BatchAnswerer:
    tokenizer: Any = FakeTokenizer()
    collector = Collector(engine, tokenizer, SamplingParameters(6))
    asked = objectives or (Length(),)
    names = [objective.name for objective in asked]
    scorer = ResponseScorer(engine, asked)  # type: ignore[arg-type]
    manner = Manner(2, 1, greedy, divergence)
    return BatchAnswerer(engine, collector, scorer, names, PROMPTS, manner)


def test_answers_have_all_that_is_known() -> None:
    engine = FakeEngine()
    engine.policy = 3
    found = answerer(engine).answer(range(4, 6))
    assert [(a.number, a.sample, a.prompt) for a in found] == [
        (4, 0, "w4"),
        (4, 1, "w4"),
        (5, 0, "w5"),
        (5, 1, "w5"),
    ]
    for answer in found:
        assert answer.scores == {"length": float(len(answer.response))}
        assert answer.tokens == len(answer.response.split()) + 1 and answer.finished
        words = [int(word[1:]) + 2 for word in answer.response.split()]
        # The engine's log-probabilities are -0.001 times the token, and of the policy thrice that.
        assert answer.kl == pytest.approx(-0.002 * (sum(words) + 1), rel=1e-5)  # of float32


@pytest.mark.parametrize(("divergence", "kl"), [("same", 0.0), ("none", None)])
def test_what_is_known_beforehand_is_not_computed(divergence: Divergence, kl: float | None) -> None:
    engine = FakeEngine()
    assert {answer.kl for answer in answerer(engine, divergence=divergence).answer([0])} == {kl}
    assert engine.calls == ["generate"]


def test_a_batch_does_not_depend_on_those_before_it() -> None:
    """So that what goes on after a crash gives the same responses."""
    whole = answerer(FakeEngine())
    both = [*whole.answer(range(0, 2)), *whole.answer(range(2, 4))]
    assert answerer(FakeEngine()).answer(range(2, 4)) == both[4:]
    assert len({answer.response for answer in both}) > 4


def test_scores_that_are_there_stay() -> None:
    given = answerer(FakeEngine(), Length("old")).answer(range(2))
    given = [replace(answer, scores={"old": -1.0}) for answer in given]
    engine = FakeEngine()
    found = answerer(engine, Length("old"), Length("new")).score(given)
    assert [answer.scores for answer in found] == [
        {"new": float(len(answer.response)), "old": -1.0} for answer in given
    ]
    assert engine.calls == []


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ((0, 7, 2, 6, 1), [(0, 3), (3, 6), (6, 7)]),
        ((3, 7, 2, 6, 1), [(3, 6), (6, 7)]),
        ((0, 7, 2, 6, 2), [(0, 6), (6, 7)]),
        ((0, 2, 9, 6, 1), [(0, 1), (1, 2)]),
        ((7, 7, 1, 6, 1), []),
    ],
)
def test_batches(arguments: tuple[int, ...], expected: list[tuple[int, int]]) -> None:
    assert [(each.start, each.stop) for each in batches(*arguments)] == expected


def test_ranks_share_a_batch_and_have_all_of_it() -> None:
    """Two replicas of two ranks each; the last batch has a prompt for one of them alone."""
    team = Team(world=4, data=2)

    def work(member: Member) -> list[list[Answer] | None]:
        asked = answerer(member)
        first = asked.answer(range(0, 3))
        told = asked.told(first[:2] if member.layout.is_main else None)
        return [first, asked.answer(range(3, 4)), told, asked.score(first)]

    first, *others = team.run(work)
    assert others == [first] * 3
    assert first[0] is not None and first[1] is not None
    assert [(a.number, a.sample) for a in first[0] + first[1]] == [divmod(i, 2) for i in range(8)]
    assert first[2] == first[0][:2] and first[3] == first[0]
    assert [len(member.prompts) for member in team.members] == [4 + 2, 4 + 2, 2, 2]


def test_ranks_that_share_experts_compute_equally_many() -> None:
    """Prompts and scores, and each answer is given once."""

    def work(engine: Member) -> tuple[list[Answer], list[Answer]]:
        given = answerer(engine, Length("old")).answer(range(5))
        return given, answerer(engine, Length("old"), Length("new")).score(given)

    expected = Team(3, 3).run(work)[0]
    team = Team(3, 3)
    for member in team.members:
        member.layout = replace(member.layout, in_step=True)
    assert team.run(work) == [expected] * 3
    assert {len(member.prompts) for member in team.members} == {2 * 2}
