"""When logits come in chunks, and what a plan says of that and of adapters."""

from __future__ import annotations

from typing import Any

import pytest
from transformers import LlamaConfig

from gapo_mega.config import Config
from gapo_mega.models import shape_of
from gapo_mega.planning.chunks import CHUNK, logits_chunk
from gapo_mega.planning.layout import check_gradients
from gapo_mega.planning.memory import predict
from gapo_mega.planning.run import RunPlan
from gapo_mega.planning.strategy import forward_kind
from tests.helpers.resolved import resolved_run

HIDDEN, VOCAB = 512, 50_000
SHAPE = shape_of(
    LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=HIDDEN,
        intermediate_size=1024,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=8192,
    )
)


def config(response: int, size: int = 2, **sections: Any) -> Config:
    model = {"path": "m", **sections.pop("model", {})}
    return Config.model_validate(
        {
            "output_dir": "o",
            "data": {"source": "s", "max_prompt_tokens": 32},
            "micro_batch_size": size,
            "rollout": {"max_new_tokens": response, "prompts_per_step": 2, "samples_per_prompt": 2},
            "objectives": [{"name": "a"}, {"name": "b"}],
            "model": model,
            **sections,
        }
    )


def test_auto_takes_chunks_where_they_save_more_than_they_cost() -> None:
    edge = (CHUNK + HIDDEN) // 2  # of two sequences
    assert logits_chunk(config(edge), SHAPE) == 0
    assert logits_chunk(config(edge + 1), SHAPE) == CHUNK
    # A frozen output layer has no gradient.
    assert logits_chunk(config(CHUNK // 2 + 1, model={"lora": {}}), SHAPE) == CHUNK
    assert logits_chunk(config(CHUNK // 2, model={"lora": {}}), SHAPE) == 0
    assert logits_chunk(config(8, model={"logits_chunk": 3}), SHAPE) == 3
    assert logits_chunk(config(edge + 1, model={"logits_chunk": 0}), SHAPE) == 0


@pytest.mark.parametrize("model", [{}, {"lora": {}}, {"recompute": "full"}])
def test_auto_never_plans_more_memory_than_all_at_once(model: dict[str, Any]) -> None:
    for response in (64, 600, 800, 1500, 4000):
        gradients = {"forward": "separate"}
        peaks = [
            predict(
                resolved_run(
                    config(response, model={**model, "logits_chunk": chunk}, gradients=gradients),
                    shape=SHAPE,
                )
            ).peak
            for chunk in ("auto", 0)
        ]
        assert peaks[0] <= peaks[1], response


def test_a_number_leaves_out_shared_passes() -> None:
    chosen = config(64, size=4, model={"logits_chunk": 16}, gradients={"forward": "shared"})
    with pytest.raises(ValueError, match=r"gradients.forward: found shared with model.logits_chunk 16 \("):
        check_gradients(chosen, SHAPE, 1)
    auto = config(64, size=4, model={"logits_chunk": 16})
    assert forward_kind(auto, 1, by_token=True) == "separate"
    assert forward_kind(config(64, size=4), 1, by_token=True) == "shared"


def test_a_plan_tells_of_adapters() -> None:
    whole, adapted = (
        resolved_run(config(64, model=model), shape=SHAPE) for model in ({}, {"lora": {"rank": 2}})
    )
    plans = [predict(resolved).stages[0] for resolved in (whole, adapted)]
    # q, k, v, o of 512 to 512, gate and up to 1024, down from 1024: rank 2, two layers.
    count = 2 * 2 * (4 * (512 + 512) + 3 * (512 + 1024))
    assert plans[1].policy_parameters - plans[0].policy_parameters == count
    assert plans[1].gradients == 4 * count and plans[1].optimizer == 8 * count
    assert plans[1].objective_rows == 4 * count
    assert plans[1].reference == 0 and plans[0].reference == 4 * plans[0].policy_parameters
    told = "\n".join(RunPlan(adapted, predict(adapted)).lines())
    assert "adapters: rank 2 on q_proj, k_proj, v_proj, o_proj, gate_proj, up_proj, down_proj" in told
    assert f", {count} parameters;" in told
    assert "no second copy" in told
    assert "adapters" not in "\n".join(RunPlan(whole, predict(whole)).lines())


def test_packed_rows_may_be_all_response_but_a_token_each() -> None:
    edge = (CHUNK + HIDDEN) * 65 // 64 + 1
    assert logits_chunk(config(64, micro_batch_tokens=edge - 2), SHAPE) == 0
    assert logits_chunk(config(64, micro_batch_tokens=edge + 64), SHAPE) == CHUNK
