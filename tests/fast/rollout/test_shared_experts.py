"""Data ranks that share experts of a score model: where one of them fails, none waits for it there."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

import pytest

from gapo_mega.config import EvaluationConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.objectives.base import TokenScorer
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.heldout import HeldOut
from gapo_mega.rollout.response_scores import attach_score_models
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.types import Prompt, ResponseFacts
from tests.helpers.fake_engine import FakeTokenizer
from tests.helpers.scoring import Length, scorer
from tests.helpers.team import Member, Team

PROMPTS = [Prompt(i, f"w{i}", (2 + i, 3)) for i in range(4)]


class OfModel(Length):
    """Scores by the engine's model; ``fails`` before it or after it."""

    def __init__(self, name: str, fails: str | None = None) -> None:
        super().__init__(name, model=object())
        self._fails = fails
        self._scorer: TokenScorer | None = None

    def attach(self, scorer: TokenScorer) -> None:
        self._scorer = scorer

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        assert self._scorer is not None
        if self._fails == "before":
            raise ValueError(f"objective {self.name!r}: no")
        scores = self._scorer([[1] * len(response) for response in responses])
        if self._fails == "after":
            raise ValueError(f"objective {self.name!r}: no")
        return scores


def team(world: int, data: int) -> Team:
    """Whose score models take all ranks at once, as those whose experts they share."""
    found = Team(world, data)
    together = threading.Barrier(world, timeout=20)

    def shared(tokens: Sequence[Sequence[int]]) -> list[float]:
        together.wait()
        return [float(len(row)) for row in tokens]

    for member in found.members:
        member.layout = replace(member.layout, in_step=True)
        member.score_model = lambda request: shared  # type: ignore[method-assign]
    return found


def heldout(engine: Member, objectives: Sequence[Length]) -> HeldOut:
    attach_score_models(engine, objectives)
    tokenizer: Any = FakeTokenizer()
    collector = Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=6))
    evaluation = EvaluationConfig(samples_per_prompt=2)
    return HeldOut(engine, collector, scorer(engine, objectives), PROMPTS, evaluation, 1)


FAILING: list[Callable[[bool], list[Length]]] = [
    lambda here: [OfModel("model"), Length("bad", fail=here)],
    lambda here: [OfModel("bad", "before" if here else None), OfModel("model")],
    lambda here: [OfModel("bad", "after" if here else None), OfModel("model")],
    lambda here: [OfModel("model"), OfModel("bad", "before" if here else None)],
]


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("training", [True, False])
@pytest.mark.parametrize("objectives", FAILING, ids=["function", "before", "between", "second"])
def test_all_raise_what_one_replica_raises(
    world: int, training: bool, objectives: Callable[[bool], list[Length]]
) -> None:
    """In training, and where nobody else sees to it that data ranks agree, as in an evaluation."""

    def error_of(engine: Member) -> str:
        own = objectives(engine.layout.data_rank == 1)
        attach_score_models(engine, own)
        tokenizer: Any = FakeTokenizer()
        collector = Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=6))
        rollout, asked = collector.collect(PROMPTS, 2, 7), scorer(engine, own)
        with pytest.raises(ValueError) as caught:
            if training:
                asked.agreed_scores(rollout)
            else:
                asked.scores(rollout.prompts, rollout.responses)
        return str(caught.value)

    assert team(world, 2).run(error_of) == ["objective 'bad': no"] * world


def test_where_nothing_fails_answers_are_those_of_ranks_that_share_nothing() -> None:
    def answers(engine: Member) -> object:
        return heldout(engine, [OfModel("model"), Length("length"), OfModel("other")]).answer()

    assert team(4, 2).run(answers) == Team(4, 2).run(answers)


def test_held_out_prompts_are_scored_only_when_every_rank_has_its_responses() -> None:
    """A server that one rank has lost is asked again, while no other is in the score model."""
    ranks = team(2, 2)

    def lost() -> None:
        raise ServerLost("gone")

    ranks.members[1].at = {("generate", 1): lost}
    found = ranks.run(lambda engine: heldout(engine, [OfModel("model")]).answer())
    assert found[0] == found[1] and len(found[0].responses) == 2 * len(PROMPTS)
    assert [member.calls.count("generate") for member in ranks.members] == [2, 2]
