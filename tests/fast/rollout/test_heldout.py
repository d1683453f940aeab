"""Held-out answers over data ranks: complete, in the prompts' order, the same everywhere and every time."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gapo_mega.config import EvaluationConfig
from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.heldout import Answers, HeldOut
from gapo_mega.types import Prompt
from tests.helpers.fake_engine import FakeTokenizer
from tests.helpers.scoring import Length, scorer
from tests.helpers.team import Team

PROMPTS = [Prompt(i, f"w{i}", (2 + i,)) for i in range(5)]


def answers(engine: Any, prompts: list[Prompt] = PROMPTS, seed: int = 1) -> Answers:
    tokenizer: Any = FakeTokenizer()
    collector = Collector(engine.generator, tokenizer, SamplingParameters(max_new_tokens=6))
    objectives = [Length("a"), Length("b")]
    evaluation = EvaluationConfig(samples_per_prompt=2)
    return HeldOut(engine, collector, scorer(engine, objectives), prompts, evaluation, seed).answer()


@pytest.mark.parametrize(("world", "data"), [(1, 1), (2, 2), (3, 3), (4, 2), (8, 8)])
def test_all_prompts_in_order_on_every_rank(world: int, data: int) -> None:
    """Also where the prompts do not come out even, and where a rank has none."""
    team = Team(world, data)
    first, *others = team.run(answers)
    assert all(other == first for other in others)
    assert first.prompts == [prompt.text for prompt in PROMPTS for _ in range(2)]
    assert first.scores == [[float(len(response)) for response in first.responses]] * 2
    # Every replica answered its own share, each prompt's samples side by side.
    for replica in range(data):
        member = team.members[replica * (world // data)]
        assert member.prompts == [p.token_ids for p in PROMPTS[replica::data] for _ in range(2)]


@pytest.mark.parametrize(("world", "data"), [(2, 2), (3, 3), (8, 8), (8, 4)])
def test_ranks_that_share_experts_answer_equally_many(world: int, data: int) -> None:
    """Every prompt once all the same, by the replica whose it is."""
    expected = Team(world, data).run(answers)[0]
    team = Team(world, data)
    for member in team.members:
        member.layout = replace(member.layout, in_step=True)
    assert all(found == expected for found in team.run(answers))
    assert {len(member.prompts) for member in team.members} == {-(-len(PROMPTS) // data) * 2}


def test_the_same_again_with_the_same_policy_and_seed() -> None:
    one, other = (Team(2, 2).run(answers)[0] for _ in range(2))
    assert one == other
    assert Team(2, 2).run(lambda engine: answers(engine, seed=2))[0].responses != one.responses


def test_no_prompts_no_answers() -> None:
    assert Team(2, 2).run(lambda engine: answers(engine, [])) == [Answers([], [], [])] * 2
