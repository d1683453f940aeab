"""The memory prediction of models with experts, which have owners of their own, against arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import MixtralConfig, MixtralForCausalLM

from gapo_mega.config import Config
from gapo_mega.models import shape_of
from gapo_mega.planning.memory import StagePlan, predict
from tests.helpers.resolved import SIZES, resolved_run

MIXTRAL = MixtralConfig(**SIZES, num_local_experts=4, num_experts_per_tok=2)
EXPERTS = 6 * 4 * 3 * 48 * 96  # parameters of all experts


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m", "dtype": "fp32"},
        "micro_batch_size": 1,
        "data": {"source": "s", "max_prompt_tokens": 100},
        "rollout": {"max_new_tokens": 28},
        "objectives": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    }
    return Config.model_validate(base | sections)


def of_experts(parallel: dict[str, Any], world: int, **model: Any) -> StagePlan:
    run = config(parallel=parallel, model={"path": "m", "dtype": "fp32", **model})
    (stage,) = predict(resolved_run(run, world, shape=shape_of(MIXTRAL))).stages
    return stage


def test_data_ranks_that_share_experts_hold_a_part_of_them() -> None:
    expected = sum(p.numel() for p in MixtralForCausalLM(MIXTRAL).parameters())
    alone, shared = of_experts({}, 4), of_experts({"expert": 2}, 4)
    assert (alone.policy_parameters, shared.policy_parameters) == (expected, expected - EXPERTS // 2)
    # Two ranks have the same half of the experts, four have the same of all else; Adam has two moments.
    assert alone.optimizer == 2 * 4 * (expected // 4)
    assert shared.optimizer == pytest.approx(2 * 4 * ((expected - EXPERTS) / 4 + EXPERTS / 2 / 2), abs=16)
    assert shared.optimizer == pytest.approx(alone.optimizer, abs=16)
    # With as many ranks to a set of experts as there are, nobody else has theirs.
    assert of_experts({"expert": 4}, 4).policy_parameters == expected - 3 * EXPERTS // 4


def test_whole_experts_on_the_ranks_of_a_layer_have_more_owners() -> None:
    """Four tensor ranks hold a model once, and its experts twice."""
    parallel = {"tensor": 4, "sequence_parallel": True, "expert": 2, "expert_tensor": 1}
    shape = shape_of(MixtralConfig(**(SIZES | {"num_key_value_heads": 4}), num_local_experts=4))
    run = config(parallel=parallel, gradients={"forward": "separate"})
    (stage,) = predict(resolved_run(run, 8, shape=shape)).stages
    others = stage.policy_parameters - EXPERTS // 2
    # Two data ranks: two owners of all else, four of a half of the experts. Adam has two moments; all but one
    # of three gradients are rows.
    owned = others // 2 + EXPERTS // 2 // 4
    assert (stage.optimizer, stage.objective_rows) == (2 * 4 * owned, 2 * 4 * owned)


def test_losses_of_routers_take_a_row() -> None:
    plain, more = of_experts({}, 2), of_experts({}, 2, router_z_loss=0.001)
    assert more.objective_rows - plain.objective_rows == 4 * (plain.policy_parameters // 2)


def test_ranks_that_share_experts_hold_each_others_tokens() -> None:
    """Of MLPs so narrow, and of so many ranks, that these tokens are what the last layer needs most of."""
    narrow = MixtralConfig(**(SIZES | {"intermediate_size": 4}), num_local_experts=16)

    def activations(expert: int) -> int:
        data, rollout = (
            {"source": "s", "max_prompt_tokens": 15},
            {"max_new_tokens": 1, "prompts_per_step": 64},
        )
        run = config(parallel={"expert": expert}, data=data, rollout=rollout, micro_batch_size=32)
        (stage,) = predict(resolved_run(run, 16, shape=shape_of(narrow))).stages
        return stage.activations

    # In Megatron's buffer, and once more where the last layer's backward begins.
    assert activations(16) - activations(8) == 2 * 4 * 8 * (32 * 16 * 48)
    assert activations(8) > activations(1)
