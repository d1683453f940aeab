"""What a save in the background is predicted to hold, against what the checkpoint takes on the disk."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
from transformers import LlamaConfig

from gapo_mega.config import Config
from gapo_mega.models import shape_of
from gapo_mega.planning.disk import predict_training
from gapo_mega.planning.memory import MemoryPlan, predict
from gapo_mega.planning.resolved import ResolvedRun
from tests.helpers.resolved import resolved_run


def run(tied: bool, asynchronous: bool, world: int, **sections: Any) -> ResolvedRun:
    hf_config = LlamaConfig(
        vocab_size=256,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=6,
        num_attention_heads=4,
        tie_word_embeddings=tied,
    )
    base: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m", "dtype": "bf16"},
        "data": {"source": "s", "max_prompt_tokens": 100},
        "objectives": [{"name": "a"}, {"name": "b"}],
        "parallel": {"pipeline": 2},
        "checkpoint": {"every_steps": 1, "asynchronous": asynchronous},
    }
    return resolved_run(Config.model_validate(base | sections), world, shape=shape_of(hf_config))


def held(plan: MemoryPlan) -> list[int]:
    return [stage.held_checkpoint for stage in plan.stages]


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize(
    "sections",
    [
        {},
        {"model": {"path": "m", "dtype": "fp32"}, "optimizer": {"distributed": False, "name": "sgd"}},
        {"model": {"path": "m", "dtype": "bf16", "lora": {"rank": 4}}},
        {"advantages": {"name": "gae"}},
    ],
    ids=["adam", "sgd", "adapters", "critic"],
)
def test_stages_together_hold_what_is_written(tied: bool, sections: dict[str, Any]) -> None:
    """Whatever the number of data ranks: the first one holds what all of them step."""
    found = run(tied, True, 4, **sections)
    plan = predict(found)
    assert min(held(plan)) > 0
    assert sum(held(plan)) == predict_training(found).checkpoint
    assert held(predict(run(tied, True, 2, **sections))) == held(plan)


def test_a_critic_is_held_too() -> None:
    policy, both = (
        sum(held(predict(run(True, True, 2, **more)))) for more in ({}, {"advantages": {"name": "gae"}})
    )
    assert both > 1.5 * policy


def test_running_means_are_held_in_fp32() -> None:
    """In a checkpoint they are, whatever they are in a step."""
    plain = predict(run(True, True, 2)).stages[0]
    averaged = {"name": "gapo", "average": 0.9, "average_dtype": "bf16"}
    stage = predict(run(True, True, 2, aggregation=averaged)).stages[0]
    assert stage.held_checkpoint - plain.held_checkpoint == 2 * 4 * stage.policy_parameters


def test_the_copy_is_no_part_of_the_peak_and_nothing_without_it() -> None:
    late, at_once = predict(run(True, True, 2)), predict(run(True, False, 2))
    assert [replace(stage, held_checkpoint=0) for stage in late.stages] == at_once.stages
    assert late.peak == at_once.peak
    assert "checkpoint (host memory)" in late.table()
    assert "checkpoint" not in at_once.table()
