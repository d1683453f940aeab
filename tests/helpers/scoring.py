"""Objectives and scorers above a fake engine."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from gapo_mega.advantages.rewards import token_rewards
from gapo_mega.config import AlgorithmConfig
from gapo_mega.rollout.score import Scorer
from gapo_mega.types import Prompt, ResponseFacts
from tests.helpers.fake_engine import FakeEngine


class Length:
    """Letters of a response; counts how often it was asked."""

    def __init__(self, name: str = "length", model: object | None = None, fail: bool = False) -> None:
        self.name = name
        self.wanted_model = model
        self.reads_facts = False
        self.asked = 0
        self._fail = fail

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        pass

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        self.asked += 1
        if self._fail:
            raise ValueError(f"objective {self.name!r}: no")
        return [float(len(response)) for response in responses]


@contextmanager
def no_time(name: str) -> Iterator[None]:
    yield


def scorer(
    engine: FakeEngine, objectives: Sequence[Length], with_values: bool = False, **algorithm: Any
) -> Scorer:
    settings = AlgorithmConfig.model_validate({"kl_beta": 0.5, **algorithm})
    return Scorer(engine, objectives, settings, token_rewards, with_values, no_time)
