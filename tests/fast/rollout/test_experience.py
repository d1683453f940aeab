"""A step's batch above a fake engine: what is wrong with its scores is said in their words."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Any

import pytest

from gapo_mega.advantages import build
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.experience import ExperienceMaker
from gapo_mega.types import Prompt
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer
from tests.helpers.scoring import Length, no_time, scorer


class Huge(Length):
    """Finite scores whose differences float32 does not hold."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        return [3e38 if index % 2 else -3e38 for index in range(len(responses))]


def maker(objectives: Sequence[Length], estimator: str = "group") -> ExperienceMaker:
    engine, tokenizer = FakeEngine(), FakeTokenizer()
    parts: Any = (
        engine,
        Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=4)),  # type: ignore[arg-type]
        scorer(engine, objectives, kl_beta=0.0),
        build(estimator),
        [objective.name for objective in objectives],
    )
    return ExperienceMaker(*parts, samples=2, whitened=False, timer=no_time)


def test_scores_whose_advantages_are_infinite_are_named(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        experience, _ = maker([Length("length"), Huge("huge")]).make([Prompt(0, "w0", (2,))], seed=1)
    (message,) = caplog.messages
    assert message.startswith("objective huge: found the score -3.0")
    assert "in row 0, whose advantage is not finite (2 rows in all)" in message
    assert experience.advantages_MBT is not None
    assert bool(experience.advantages_MBT[0].isfinite().all())


def test_ordinary_scores_are_no_news(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        maker([Length("length"), Length("again")]).make([Prompt(0, "w0", (2,))], seed=1)
    assert caplog.messages == []


class OfPrompt(Length):
    """The prompt's number, and one more for every response after the first of a call to it."""

    def score(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[float]:
        self.seen.append([prompt.index for prompt in prompts])
        before: list[int] = []
        scores = []
        for prompt in prompts:
            scores.append(10.0 * prompt.index + before.count(prompt.index))
            before.append(prompt.index)
        return scores

    seen: list[list[int]]


def test_remax_answers_and_scores_every_prompt_once_more() -> None:
    objective = OfPrompt("number")
    objective.seen = []
    experience, _ = maker([objective], "remax").make([Prompt(i, f"w{i}", (2 + i,)) for i in (3, 1)], seed=1)
    assert objective.seen == [[3, 3, 1, 1], [3, 1]]
    assert experience.greedy_scores_MB is not None
    assert experience.greedy_scores_MB.tolist() == [[30.0, 30.0, 10.0, 10.0]]
    assert experience.advantages_MBT is not None
    first_B = experience.response_mask_BT.int().argmax(dim=1)
    assert [float(experience.advantages_MBT[0, b, t]) for b, t in enumerate(first_B)] == [0.0, 1.0, 0.0, 1.0]


def test_no_other_estimator_asks_for_greedy_responses() -> None:
    objective = OfPrompt("number")
    objective.seen = []
    experience, _ = maker([objective]).make([Prompt(3, "w3", (2,))], seed=1)
    assert objective.seen == [[3, 3]] and experience.greedy_scores_MB is None
