"""The memory prediction: parameter counts against transformers' models, the rest against arithmetic."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedConfig,
)

from gapo_mega.config import Config
from gapo_mega.models import ModelShape, shape_of
from gapo_mega.objectives.base import ScoreModelRequest
from gapo_mega.planning.activations import sizes_of
from gapo_mega.planning.blocks import Block, Counter
from gapo_mega.planning.memory import GIB, MemoryPlan, StagePlan, critic_parameters, predict, stage_parameters
from gapo_mega.planning.run import RunPlan
from tests.helpers.resolved import SIZES, resolved_run

MISTRAL_7B = MistralConfig(vocab_size=32000)  # transformers' defaults are Mistral 7B


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m", "dtype": "bf16"},
        "data": {"source": "s", "max_prompt_tokens": 100},
        "rollout": {"max_new_tokens": 28},
        "objectives": [{"name": "a"}, {"name": "b"}, {"name": "c"}],
    }
    return Config.model_validate(base | sections)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    ("kind", "build"), [(LlamaConfig, LlamaForCausalLM), (MistralConfig, MistralForCausalLM)]
)
def test_count_of_a_real_model(kind: type[PreTrainedConfig], build: Any, tied: bool) -> None:
    hf_config = kind(**SIZES, tie_word_embeddings=tied)
    expected = sum(p.numel() for p in build(hf_config).parameters())
    shape = shape_of(hf_config)
    assert stage_parameters(shape, 1, 1, 0) == expected
    # Without tying, stages add up to the model; with it, the last stage has a copy of the embedding.
    copy = 256 * 48 if tied else 0
    for pipeline in (2, 3):
        assert sum(stage_parameters(shape, 1, pipeline, s) for s in range(pipeline)) == expected + copy
    # Tensor ranks share everything but the 2 norms of each of 6 layers and the final one. One rank more also
    # pads the vocabulary to a multiple of 2 x 128, which 256 already is.
    assert 2 * stage_parameters(shape, 2, 1, 0) == expected + 13 * 48


def test_padding_of_the_vocabulary() -> None:
    shape = shape_of(LlamaConfig(**(SIZES | {"vocab_size": 257}), tie_word_embeddings=True))
    whole = shape_of(LlamaConfig(**(SIZES | {"vocab_size": 384}), tie_word_embeddings=True))
    assert stage_parameters(shape, 1, 1, 0) == stage_parameters(whole, 1, 1, 0)


def test_critic_has_heads_for_the_output_layer() -> None:
    shape = shape_of(LlamaConfig(**SIZES, tie_word_embeddings=False))
    assert critic_parameters(shape, 1, 1, 0, 3) == stage_parameters(shape, 1, 1, 0) - 256 * 48 + 3 * 49
    assert critic_parameters(shape, 1, 2, 0, 3) == stage_parameters(shape, 1, 2, 0)


def test_score_models_and_the_reference_stay_or_visit() -> None:
    shape: ModelShape = shape_of(MISTRAL_7B)
    count = stage_parameters(shape, 4, 1, 0)
    head = (
        stage_parameters(shape, 4, 1, 0) - 32256 // 4 * 4096 + 4096 + 1
    )  # no output layer, a head with bias
    scored = [
        (ScoreModelRequest("a", "bf16", 8, offload=False), shape),
        (ScoreModelRequest("b", "fp32", 8, offload=True), shape),
    ]
    (stage,) = predict(resolved_run(config(parallel={"tensor": 4}), 4, shape=shape, scored=scored)).stages
    assert (stage.score_models, stage.visiting) == (2 * head, 4 * head)
    assert stage.peak - stage.resident >= stage.visiting
    settings = config(parallel={"tensor": 4}, model={"path": "m", "dtype": "bf16", "offload_reference": True})
    (stage,) = predict(resolved_run(settings, 4, shape=shape)).stages
    assert (stage.reference, stage.visiting, stage.score_models) == (0, 2 * count, 0)


def test_mistral_7b_on_eight_ranks() -> None:
    shape: ModelShape = shape_of(MISTRAL_7B)
    count = stage_parameters(shape, 4, 1, 0)
    # 7.24e9 parameters, as published. 4 tensor ranks hold the norms (266240) each, and pad the 32000 rows of
    # the embedding and of the output layer to a multiple of 4 x 128: 256 rows more.
    assert stage_parameters(shape, 1, 1, 0) == 7_241_732_096
    assert 4 * count == 7_241_732_096 + 3 * 266_240 + 2 * 256 * 4096
    (stage,) = predict(resolved_run(config(parallel={"tensor": 4}), 8, shape=shape)).stages
    assert stage.parameters == stage.reference == 2 * count
    assert stage.gradients == 4 * count
    assert stage.optimizer == 12 * count // 2  # fp32 main parameters and two moments, over 2 data ranks
    # All objectives but the one in the gradient buffer, before they are shared out over the data ranks.
    assert stage.objective_rows == 2 * 4 * count
    assert stage.critic == 0
    # keys and values x layers x sequences x tokens x (2 of 8 groups of 128) x 2 bytes
    assert stage.kv_cache == 2 * 32 * 16 * 128 * 2 * 128 * 2
    assert stage.peak == stage.resident + max(stage.activations, stage.kv_cache)


def test_optimizer_kinds() -> None:
    shape = shape_of(LlamaConfig(**SIZES))
    count = stage_parameters(shape, 1, 1, 0)

    def optimizer_bytes(dtype: str, **settings: Any) -> int:
        (stage,) = predict(
            resolved_run(config(model={"path": "m", "dtype": dtype}, optimizer=settings), 2, shape=shape)
        ).stages
        return stage.optimizer

    assert optimizer_bytes("fp32", distributed=False) == 8 * count
    assert optimizer_bytes("fp32", distributed=True) == 4 * count
    assert optimizer_bytes("fp32", name="sgd", distributed=False) == 0
    assert optimizer_bytes("bf16", name="sgd", momentum=0.9, distributed=False) == 8 * count


def test_critic_models() -> None:
    shape = shape_of(LlamaConfig(**SIZES))
    shared, separate = (
        predict(resolved_run(config(advantages={"name": "gae"}, critic={"heads": heads}), shape=shape))
        .stages[0]
        .critic
        for heads in ("shared", "separate")
    )
    # bf16 parameters, fp32 gradient, fp32 main parameters and moments: 18 bytes each
    assert shared == 18 * critic_parameters(shape, 1, 1, 0, 3)
    assert separate == 3 * 18 * critic_parameters(shape, 1, 1, 0, 1)


def test_recomputation_saves_and_the_table_shows_every_stage() -> None:
    shape = shape_of(MISTRAL_7B)
    plans = {
        kind: predict(
            resolved_run(
                config(model={"path": "m", "dtype": "bf16", "recompute": kind}, parallel={"pipeline": 2}),
                2,
                shape=shape,
            )
        )
        for kind in ("none", "selective", "full")
    }
    none, selective, full = (plans[kind].stages[0].activations for kind in ("none", "selective", "full"))
    assert none > selective > full > 0
    first, last = plans["none"].stages
    assert last.parameters > first.parameters  # the final norm
    table = plans["none"].table().splitlines()
    assert table[0].split() == ["GiB", "per", "rank", "stage", "0", "stage", "1"]
    assert float(table[1].split()[1]) == pytest.approx(
        first.parameters / 2**30, abs=5e-3
    )  # printed to 2 digits
    assert plans["none"].peak == max(first.peak, last.peak)


def test_rows_of_every_gradient_strategy() -> None:
    shape = shape_of(LlamaConfig(**SIZES, tie_word_embeddings=False))
    count, layer = (
        stage_parameters(shape, 1, 1, 0),
        48 * (4 + 2 * 2) * 16 + 4 * 16 * 48 + 3 * 48 * 96 + 2 * 48,
    )
    output = 256 * 48

    def rows(
        world: int = 1,
        pipeline: int = 1,
        stage: int = 0,
        aggregation: dict[str, Any] | None = None,
        **gradients: Any,
    ) -> int:
        sections = {"parallel": {"pipeline": pipeline}, "gradients": gradients}
        plan = predict(resolved_run(config(**sections, aggregation=aggregation or {}), world, shape=shape))
        return plan.stages[stage].objective_rows

    assert rows() == 2 * 4 * count  # three objectives, one of them in Megatron's buffer
    assert rows(world=2) == 2 * 4 * count
    assert rows(world=2, forward="separate") == rows(world=2, forward="shared") == 2 * 4 * (count // 2)
    assert rows(store_dtype="bf16") == 2 * 2 * count
    assert rows(store="single") == 0
    assert rows(metric="adam") == 3 * 4 * count  # and the parameters before the step
    assert rows(metric="adam", actual_change=False) == 2 * 4 * count
    assert rows(scope="last_layer") == 3 * 4 * output
    # A running mean of every gradient, over what a rank owns.
    average: dict[str, Any] = {"average": 0.9}
    assert rows(aggregation=average) == (2 + 3) * 4 * count
    assert rows(aggregation=average | {"average_dtype": "bf16"}) == (2 * 4 + 3 * 2) * count
    # One pass keeps whole rows, and means of what the rank owns.
    assert rows(world=2, aggregation=average) == 2 * 4 * count + 3 * 4 * (count // 2)
    assert rows(scope="last_block") == 3 * 4 * output + 2 * 4 * layer
    assert rows(scope=[[0, 1], [4, 6]]) == 2 * 4 * 3 * layer
    # Three layers a stage: the output layer and the last layer are on the last one.
    assert [rows(world=2, pipeline=2, stage=s, scope="last_block") for s in (0, 1)] == [
        0,
        3 * 4 * output + 2 * 4 * layer,
    ]
    # Two chunks a stage hold layers 0 and 2, and 1 and 3, of four layers on two stages.
    four = shape_of(LlamaConfig(**{**SIZES, "num_hidden_layers": 4}, tie_word_embeddings=False))
    interleaved = config(
        parallel={"pipeline": 2, "virtual_pipeline": 2}, gradients={"scope": [[2, 4]]}, micro_batch_size=1
    )
    stages = predict(resolved_run(interleaved, 2, shape=four)).stages
    assert [stage.objective_rows for stage in stages] == [2 * 4 * layer] * 2
    # A data rank's shard may be all of the layers in scope, but not more than a shard.
    assert rows(world=2, scope=[[0, 1]]) == 2 * 4 * layer
    assert rows(world=2, scope=[[0, 6]]) == 2 * 4 * (count // 2)


def test_a_scalarizer_keeps_rows_only_for_its_audits() -> None:
    """One gradient lies in Megatron's buffer; an audited update has those of three objectives beside it."""
    shape = shape_of(LlamaConfig(**SIZES, tie_word_embeddings=False))
    count = stage_parameters(shape, 1, 1, 0)

    def rows(every: int) -> int:
        settings = config(scalarization={"name": "gdpo"}, gradients={"audit_every": every})
        return predict(resolved_run(settings, shape=shape)).stages[0].objective_rows

    assert (rows(0), rows(5)) == (0, 3 * 4 * count)


def test_a_safe_scalarizer_keeps_the_rows_of_every_objective() -> None:
    """As an aggregator does, with running means on top."""

    def stage(**sections: Any) -> StagePlan:
        shape = shape_of(LlamaConfig(**SIZES, tie_word_embeddings=False))
        return predict(resolved_run(config(**sections), shape=shape)).stages[0]

    safe = {"name": "fast_rl", "options": {"safe": True}}
    for average in ({}, {"average": 0.9}):
        found, own = stage(scalarization=safe, aggregation=average), stage(aggregation=average)
        assert found == own and found.objective_rows > 0
    assert stage(scalarization={"name": "fast_rl"}).objective_rows == 0


def test_counter_of_blocks() -> None:
    blocks = [Block(saved=4, forward=5, backward=7), Block(saved=2, forward=9, backward=3)]
    counter = Counter()
    counter.forward(blocks)
    assert (counter.held, counter.peak) == (6, 4 + 9)
    counter.backward(blocks, keep=True)
    assert (counter.held, counter.peak) == (6, 13)  # 6 + 7: nothing was freed before the first block
    counter.backward(blocks)
    assert (counter.held, counter.peak) == (0, 13)  # 4 + 7 after the second was


def test_sizes_of_a_rank() -> None:
    settings = config(
        parallel={"tensor": 2, "sequence_parallel": True}, micro_batch_size=3, rollout={"max_new_tokens": 29}
    )
    shape = shape_of(LlamaConfig(**(SIZES | {"vocab_size": 200})))
    sizes = sizes_of(settings, shape)
    tokens = 3 * 130  # 129, padded to a multiple of the tensor-parallel size
    assert sizes.residual == tokens * 48 // 2 and sizes.hidden == sizes.gathered == tokens * 48
    assert sizes.query == tokens * 4 * 16 // 2 and sizes.key == tokens * 2 * 16 // 2
    assert sizes.scores == tokens * 130 * 4 // 2
    # 200 columns padded to 2 x 128, and 29 positions to a multiple of 2.
    assert sizes.logits == 3 * 30 * 128 and sizes.chosen == 3 * 29 * 128
    assert sizes.behind == 3 * 30 * 48
    assert sizes.grouped and sizes.bf16


def test_stages_hold_as_many_microbatches_as_are_in_flight() -> None:
    shape = shape_of(LlamaConfig(**SIZES))

    def activations(prompts: int) -> list[int]:
        rollout = {"prompts_per_step": prompts, "samples_per_prompt": 2, "max_new_tokens": 28}
        settings = config(parallel={"pipeline": 3}, micro_batch_size=2, rollout=rollout)
        return [stage.activations for stage in predict(resolved_run(settings, 3, shape=shape)).stages]

    one, many = activations(1), activations(8)
    assert one[0] == pytest.approx(one[1], rel=0.1)  # one microbatch everywhere
    assert many[0] > 1.3 * many[1] > 1.3 * one[1]  # three of them, two, and one
    assert activations(3)[0] == many[0]


def test_interleaved_stages_hold_more() -> None:
    """Megatron's schedule holds 1 + (p - 1) / (p v) times as much on the first stage (arXiv 2104.04473)."""
    shape = shape_of(LlamaConfig(**{**SIZES, "num_hidden_layers": 24, "vocab_size": 128}))

    def first(virtual: int) -> int:
        settings = config(
            parallel={"pipeline": 4, "virtual_pipeline": virtual},
            micro_batch_size=1,
            rollout={"prompts_per_step": 8, "samples_per_prompt": 2, "max_new_tokens": 28},
        )
        return predict(resolved_run(settings, 4, shape=shape)).stages[0].activations

    for virtual in (2, 3):
        # In flight are 2 (p - 1) + (v - 1) p chunks and one more, of v p without chunks.
        expected = (2 * 3 + (virtual - 1) * 4 + 1) / (virtual * 4)
        assert first(virtual) / first(1) == pytest.approx(expected, rel=0.1)


def test_plan_tells_whether_the_fullest_rank_fits() -> None:
    stage = StagePlan(0, 0, GIB, GIB, 0, 0, 0, 0, 0, 0, kv_cache=GIB, activations=GIB // 2)
    run = RunPlan(resolved_run(config(), shape=shape_of(MISTRAL_7B)), MemoryPlan([stage, stage]))
    assert run.fullest(None) == "fullest rank: 3.00 GiB"
    assert run.fullest(3.0) == "fullest rank: 3.00 GiB, fits into 3 GiB"
    assert run.fullest(2.5).endswith("does not fit into 2.5 GiB")
    assert run.lines()[0] == "layout: 1 processes = tensor 1 x pipeline 1 x data 1"
    assert not any("evaluations" in line for line in run.lines())
    beside = config(
        steps=25,
        evaluation={"every_steps": 10, "early_stopping_patience": 2},
        checkpoint={"best": "hypervolume"},
        logging={"responses": 10},
    )
    told = "\n".join(RunPlan(resolved_run(beside, shape=shape_of(MISTRAL_7B)), run.memory).lines())
    # Before, after steps 10 and 20, and after the last.
    assert (
        "evaluations: before training, every 10 steps and after the last, 4 of at most 64 responses" in told
    )
    assert "that of the best evaluation by hypervolume, which is the run's result; ends after 2" in told
    assert "responses: those of 2 steps are kept" in told
    chunks = RunPlan(
        resolved_run(config(parallel={"pipeline": 2, "virtual_pipeline": 4}), 2, shape=shape_of(MISTRAL_7B)),
        run.memory,
    )
    assert chunks.lines()[0] == "layout: 2 processes = tensor 1 x pipeline 2 (4 chunks a stage) x data 1"
    found = run.as_dict(2.5)
    assert found["fits"] is False and run.as_dict(None)["fits"] is None
    assert found["peak"] == 3 * GIB and found["stages"][1]["resident"] == 2 * GIB
    assert (
        found["layout"] == {"tensor": 1, "pipeline": 1, "virtual_pipeline": 1, "context": 1, "data": 1}
        and found["world"] == 1
    )


def test_packed_rows_are_planned_for_their_tokens() -> None:
    """As many as a rectangle's: the same per token; the scores are those within sequences."""
    shape = shape_of(LlamaConfig(**SIZES))
    packed, rectangle = sizes_of(config(micro_batch_tokens=8 * 128), shape), sizes_of(config(), shape)
    for name in ("residual", "query", "key", "ffn", "scores", "mask"):
        assert getattr(packed, name) == getattr(rectangle, name), name
    assert packed.rotary == 8 * rectangle.rotary  # one position after the other, of every sequence
    # Prompts may be as short as a token: 35 sequences of 29 tokens.
    assert packed.behind == 8 * 128 * 28 // 29 * 48 and rectangle.behind == 8 * 28 * 48
    plan = RunPlan(*_planned(config(micro_batch_tokens=1024), shape))
    assert any(
        "microbatches of at most 1024 packed tokens on a data-parallel rank" in line for line in plan.lines()
    )


def test_every_instance_holds_the_whole_optimizer_state() -> None:
    shape = shape_of(LlamaConfig(**SIZES))
    (alone,) = predict(resolved_run(config(), world=2, shape=shape)).stages
    instances = config(parallel={"distributed_optimizer_instances": 2})
    (shared,) = predict(resolved_run(instances, world=4, shape=shape)).stages
    assert shared.optimizer == alone.optimizer > 0


def _planned(settings: Config, shape: ModelShape) -> tuple[Any, MemoryPlan]:
    resolved = resolved_run(settings, shape=shape)
    return resolved, predict(resolved)
