"""Layout checks: what cannot work is refused, with the values that would."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gapo_mega.config import Config
from gapo_mega.models import ModelShape
from gapo_mega.models.shape import Experts
from gapo_mega.optional import Probe
from gapo_mega.planning import layout
from gapo_mega.planning.layout import check_model_split, data_parallel_size
from tests.helpers.resolved import check

SMOLLM2 = ModelShape(
    family="llama", num_layers=30, hidden=576, ffn=1536, heads=9, kv_groups=3, head_dim=64, vocab=49152,
    tied=True, rope_theta=1e5, norm_eps=1e-5, qkv_bias=False, max_positions=8192,
)  # fmt: skip


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m"},
        "data": {"source": "s"},
        "objectives": [{"name": "a"}, {"name": "b"}],
        "micro_batch_size": 4,
    }
    return Config.model_validate(base | sections)


@pytest.mark.parametrize(
    ("parallel", "world"),
    [
        ({}, 1),
        ({}, 2),
        ({"tensor": 3}, 3),
        ({"pipeline": 2}, 2),
        ({"tensor": 3, "pipeline": 2}, 12),
        ({"pipeline": 2, "virtual_pipeline": 5}, 2),
        ({"pipeline": 3, "virtual_pipeline": 2}, 3),
    ],
)
def test_layouts_that_work(parallel: dict[str, int], world: int) -> None:
    check(config(parallel=parallel), SMOLLM2, world)


@pytest.mark.parametrize(
    ("sections", "world", "message"),
    [
        (
            {"parallel": {"tensor": 3}},
            4,
            "parallel: found tensor 3 x pipeline 1 = 3 processes on a world of 4, accepted: a product that "
            "divides "
            "it (1, 2, 4)",
        ),
        (
            {"parallel": {"tensor": 2}},
            2,
            "parallel.tensor: found 2, accepted for a model with 9 attention heads, 3 key-value groups, "
            "1536 feed-forward width: 1, 3",
        ),
        ({"parallel": {"tensor": 9}}, 9, "parallel.tensor: found 9,"),
        (
            {"parallel": {"pipeline": 4}},
            4,
            "parallel.pipeline: found 4, accepted for 30 layers: 1, 2, 3, 5, 6, 10, 15, 30",
        ),
        (
            {},
            3,
            "rollout.prompts_per_step: found 8, accepted for 3 data-parallel ranks: a multiple of 3",
        ),
        (
            {"algorithm": {"minibatches": 3}},
            2,
            "algorithm.minibatches: found 3, accepted for the 16 sequences of a data-parallel rank: 1, 2, "
            "4, 8, 16",
        ),
        (
            {"micro_batch_size": 3, "algorithm": {"minibatches": 2}},
            2,
            "micro_batch_size: found 3, accepted for minibatches of 8 sequences on a data-parallel rank: 1, "
            "2, 4, 8",
        ),
        (
            {"parallel": {"pipeline": 2, "virtual_pipeline": 2}},
            2,
            "parallel.virtual_pipeline: found 2, accepted for the 15 layers of a pipeline stage: 1, 3, 5, 15",
        ),
        (
            {"parallel": {"pipeline": 10, "virtual_pipeline": 3}},
            10,
            "parallel.virtual_pipeline: found 3 with 8 microbatches to an optimizer step, accepted: 1, or at "
            "least 10 microbatches, one for every stage (a smaller micro_batch_size makes more)",
        ),
        (
            {"data": {"source": "s", "max_prompt_tokens": 8000}, "rollout": {"max_new_tokens": 193}},
            1,
            "data.max_prompt_tokens + rollout.max_new_tokens: found 8000 + 193 = 8193, accepted: at most "
            "the model's "
            "8192 positions",
        ),
        (
            {"rollout": {"samples_per_prompt": 1}},
            1,
            "rollout.samples_per_prompt: found 1, accepted with advantages.name group: 2 or more, because a "
            "sample is compared with the others of its prompt",
        ),
    ],
)  # fmt: skip
def test_what_cannot_work_is_refused(sections: dict[str, Any], world: int, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(config(**sections), SMOLLM2, world)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


WITH_EXPERTS = replace(SMOLLM2, heads=8, kv_groups=4, experts=Experts(6, 2, normalized=True))
TP4 = {"tensor": 4, "sequence_parallel": True}


@pytest.mark.parametrize(
    "parallel",
    [
        {},
        {"pipeline": 2},
        TP4,
        {"tensor": 2, "sequence_parallel": True, "expert": 2, "expert_tensor": 1},
        {"tensor": 2, "sequence_parallel": True, "expert": 2},
        {**TP4, "expert": 2, "expert_tensor": 1},
        {"expert": 2},
        {"pipeline": 2, "expert": 2},
        {"expert": 2, "expert_tensor": 2},
    ],
)
def test_layouts_of_experts(parallel: dict[str, Any]) -> None:
    check(config(parallel=parallel, micro_batch_size=1), WITH_EXPERTS, 4)


@pytest.mark.parametrize(
    ("parallel", "shape", "message"),
    [
        ({"tensor": 2}, WITH_EXPERTS, "parallel.sequence_parallel: found false with parallel.tensor 2"),
        (
            {**TP4, "expert": 4, "expert_tensor": 1},
            WITH_EXPERTS,
            "parallel.expert: found 4, accepted for 6 experts: 1, 2, 3, 6",
        ),
        (
            {**TP4, "expert": 2, "expert_tensor": 2},
            replace(WITH_EXPERTS, ffn=1535),
            "parallel.expert_tensor: found 2, accepted for experts of width 1535: 1, 5, 307, 1535",
        ),
        (
            {**TP4, "expert": 4, "expert_tensor": 1},
            replace(SMOLLM2, heads=8, kv_groups=4),
            "parallel.expert: found 4, accepted for a model without experts: 1",
        ),
    ],
)
def test_experts_that_cannot_be_shared(parallel: dict[str, Any], shape: ModelShape, message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(config(parallel=parallel), shape, 4)
    assert str(caught.value).startswith(message)
    assert "\n" not in str(caught.value)


def test_a_split_of_every_expert_needs_expert_parallelism() -> None:
    with pytest.raises(ValueError, match=r"parallel\.expert_tensor: found 2 with parallel\.expert 1"):
        config(parallel={**TP4, "expert_tensor": 2})


@pytest.mark.parametrize(
    ("parallel", "message"),
    [
        (
            {"expert": 3},
            "parallel.expert: found 3 with parallel.expert_tensor 1, together 3 ranks, on stages of 4",
        ),
        ({**TP4, "expert": 2}, "together 8 ranks, on stages of 4 (tensor 4 x data 1), accepted: 1"),
        ({"pipeline": 2, "expert": 6}, "on stages of 2 (tensor 1 x data 2), accepted: 1, 2"),
        ({"expert": 2, "expert_tensor": 3}, "accepted: 1, with an expert_tensor that divides 4"),
    ],
)
def test_a_stage_holds_its_experts_a_whole_number_of_times(parallel: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError) as caught:
        check(config(parallel=parallel, micro_batch_size=1), WITH_EXPERTS, 4)
    assert message in str(caught.value) and "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("parallel", "in_step"),
    [
        ({}, False),
        (TP4, False),
        ({**TP4, "expert": 4, "expert_tensor": 1}, False),
        ({**TP4, "expert": 2, "expert_tensor": 1}, False),
        ({"expert": 2}, True),
        ({"tensor": 2, "sequence_parallel": True, "expert": 2}, True),
    ],
)
def test_data_ranks_that_share_experts_go_in_step(parallel: dict[str, Any], in_step: bool) -> None:
    assert config(parallel=parallel).parallel.in_step is in_step


def test_sliding_window_bounds_the_length() -> None:
    windowed = replace(SMOLLM2, sliding_window=320)
    check(config(), windowed, 1)  # 256 + 64 tokens fill it exactly
    with pytest.raises(ValueError, match="accepted: at most 319, the model's sliding attention window"):
        check(config(), replace(SMOLLM2, sliding_window=319), 1)


def test_gae_needs_no_second_sample() -> None:
    check(
        config(advantages={"name": "gae"}, rollout={"samples_per_prompt": 1}, micro_batch_size=8), SMOLLM2, 1
    )


def test_data_parallel_size_is_the_rest_of_the_world() -> None:
    assert data_parallel_size(config(parallel={"tensor": 2, "pipeline": 3}).parallel, 24) == 4


@pytest.mark.parametrize("name", ["gae", "reinforce_pp", "remax"])
def test_only_estimators_that_compare_samples_can_leave_flat_prompts_out(name: str) -> None:
    for accepted in ("group", "grpo", "rloo"):
        check(config(advantages={"name": accepted, "filter_flat": True}), SMOLLM2, 1)
    with pytest.raises(
        ValueError,
        match=rf"advantages\.filter_flat: found true with advantages\.name {name}, accepted: false",
    ):
        check(config(advantages={"name": name, "filter_flat": True}), SMOLLM2, 1)


@pytest.mark.parametrize("name", ["router_aux_loss", "router_z_loss"])
def test_losses_of_routers_need_routers_that_are_trained(name: str) -> None:
    check(config(model={"path": "m", name: 0.01}), WITH_EXPERTS, 1)
    with pytest.raises(
        ValueError, match=f"^model.{name}: found 0.01 with a model without experts, accepted: 0$"
    ):
        check(config(model={"path": "m", name: 0.01}), SMOLLM2, 1)
    adapted = config(model={"path": "m", name: 0.01, "lora": {"target_modules": ["q_proj"]}})
    with pytest.raises(ValueError, match=f"^model.{name}: found 0.01 with model.lora, accepted: 0"):
        check(adapted, WITH_EXPERTS, 1)


def test_packed_sequences_of_experts() -> None:
    """Also where data ranks share them, and with losses of routers."""
    packed = {"micro_batch_tokens": 100_000, "micro_batch_size": 1}
    check(config(**packed, parallel={"expert": 2}), WITH_EXPERTS, 2)
    check(config(**packed, model={"path": "m", "router_z_loss": 0.1}), WITH_EXPERTS, 1)


def test_packed_sequences_divide_nothing() -> None:
    """And an interleaved pipeline wants a sequence for every stage, whatever a row holds."""
    rollout = {"prompts_per_step": 3, "samples_per_prompt": 2, "max_new_tokens": 100}
    sizes = {"rollout": rollout, "data": {"source": "s", "max_prompt_tokens": 100}}
    packed = {"micro_batch_tokens": 100_000, **sizes}
    check(config(**packed), SMOLLM2, 1)
    with pytest.raises(ValueError, match=r"micro_batch_size: found 4, accepted for minibatches of 6"):
        check(config(**sizes), SMOLLM2, 1)
    check(config(**packed, parallel={"pipeline": 6, "virtual_pipeline": 5}), SMOLLM2, 6)
    with pytest.raises(ValueError, match=r"parallel.virtual_pipeline: found 3 with 6 microbatches"):
        check(config(**packed, parallel={"pipeline": 10, "virtual_pipeline": 3}), SMOLLM2, 10)


def test_experts_have_no_adapters() -> None:
    with pytest.raises(ValueError) as caught:
        check(config(model={"path": "m", "lora": {}}), WITH_EXPERTS, 1)
    assert str(caught.value).startswith(
        "model.lora.target_modules: found gate_proj, up_proj, down_proj with a model with experts, accepted: "
        "q_proj, k_proj, v_proj, o_proj"
    )
    check(config(model={"path": "m", "lora": {"target_modules": ["q_proj", "o_proj"]}}), WITH_EXPERTS, 1)


def test_experts_are_shared_within_a_replica_or_by_whole_ones() -> None:
    """Ranks 0 to 2 of six with tensor 2 would be one replica and half of the next."""
    parallel = {"tensor": 2, "sequence_parallel": True, "expert": 3, "expert_tensor": 1}
    with pytest.raises(
        ValueError, match=r"^parallel\.expert: found 3 .* \(tensor 2 x data 3\), accepted: 1, 2, 6$"
    ):
        check_model_split(config(parallel=parallel).parallel, WITH_EXPERTS, "fp32", 6)
    check_model_split(config(parallel={**parallel, "expert": 6}).parallel, WITH_EXPERTS, "fp32", 6)


def test_instances_share_the_data_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"distributed_optimizer_instances": 2}
    check(config(parallel=two), SMOLLM2, 4)
    check(config(parallel=two), WITH_EXPERTS, 4)
    with pytest.raises(
        ValueError, match=r"instances: found 2 with experts that data ranks share .* 1 \(the two "
    ):
        check(config(parallel={"expert": 2, **two}), WITH_EXPERTS, 4)
    with pytest.raises(ValueError, match=r"instances: found 2, accepted for 1 data-parallel ranks: 1$"):
        check(config(parallel={"tensor": 3, **two}), SMOLLM2, 3)
    monkeypatch.setattr(layout, "einops", lambda: Probe(False, "", "it"))
    check(config(parallel=two), SMOLLM2, 4)  # a plan needs no package
    with pytest.raises(
        ValueError, match=r"instances: found 2 without the package einops.*gapo-mega\[instances\]"
    ):
        layout.check_packages(config(parallel=two).parallel)
    monkeypatch.setattr(layout, "einops", lambda: Probe(True, "einops", ""))
    layout.check_packages(config(parallel=two).parallel)


@pytest.mark.parametrize(
    ("sections", "message"),
    [
        ({"optimizer": {"distributed": False}}, "with optimizer.distributed false, accepted: 1"),
        ({"critic": {"optimizer": {"distributed": False}}}, "with critic.optimizer.distributed false"),
        ({"optimizer": {"overlap_grad_reduce": True}}, "with optimizer.overlap_grad_reduce true"),
    ],
)
def test_instances_of_what_is_none_are_refused(sections: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"parallel.distributed_optimizer_instances: found 2 {message}"):
        config(parallel={"distributed_optimizer_instances": 2}, **sections)


def test_transformer_engine_packs_bf16_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    packed = {"micro_batch_tokens": 100_000}
    check(config(**packed), SMOLLM2, 1)
    monkeypatch.setattr(layout, "transformer_engine_layers", lambda: True)
    check(config(**packed, model={"path": "m", "dtype": "bf16"}), SMOLLM2, 1)
    with pytest.raises(ValueError, match=r"micro_batch_tokens: found 100000 with model.dtype fp32"):
        check(config(**packed), SMOLLM2, 1)
