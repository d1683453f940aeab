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
from gapo_mega.types import Prompt, ResponseFacts
from tests.helpers.fake_engine import FakeEngine, FakeTokenizer
from tests.helpers.scoring import Length, no_time, scorer


class Huge(Length):
    """Finite scores whose differences float32 does not hold."""

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        return [3e38 if index % 2 else -3e38 for index in range(len(responses))]


def maker(objectives: Sequence[Length]) -> ExperienceMaker:
    engine, tokenizer = FakeEngine(), FakeTokenizer()
    parts: Any = (
        engine,
        Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=4)),  # type: ignore[arg-type]
        scorer(engine, objectives, kl_beta=0.0),
        build("group"),
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
