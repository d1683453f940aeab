"""Context parallelism in the plan: layouts, refusals, memory."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest

from gapo_mega.config import Config
from gapo_mega.models import ModelShape
from gapo_mega.models.shape import Experts
from gapo_mega.planning import layout
from gapo_mega.planning.activations import sizes_of
from gapo_mega.planning.layout import check_model_split
from gapo_mega.planning.memory import predict
from tests.helpers.resolved import check, resolved_run

SHAPE = ModelShape(
    family="llama", num_layers=6, hidden=48, ffn=96, heads=6, kv_groups=3, head_dim=16, vocab=256,
    tied=True, rope_theta=1e5, norm_eps=1e-5, qkv_bias=False, max_positions=8192,
)  # fmt: skip
WITH_EXPERTS = replace(SHAPE, experts=Experts(6, 2, normalized=True))


def config(**sections: Any) -> Config:
    base: dict[str, Any] = {
        "output_dir": "o",
        "model": {"path": "m", "dtype": "bf16"},
        "data": {"source": "s", "max_prompt_tokens": 100},
        "rollout": {"max_new_tokens": 28},
        "objectives": [{"name": "a"}, {"name": "b"}],
    }
    return Config.model_validate(base | sections)


def test_ranks_that_share_sequences_have_a_part_of_activations_and_optimizer() -> None:
    one, two = config(), config(parallel={"context": 2})
    whole, half = sizes_of(one, SHAPE), sizes_of(two, SHAPE)
    for name in ("residual", "query", "ffn", "scores", "mask"):
        assert 2 * getattr(half, name) == getattr(whole, name), name
    assert half.repeated == whole.repeated > 0  # gathered
    (alone,) = predict(resolved_run(one, shape=SHAPE)).stages
    (shared,) = predict(resolved_run(two, world=2, shape=SHAPE)).stages
    assert 2 * shared.optimizer == alone.optimizer > 0
    assert shared.gradients == alone.gradients
    assert shared.activations < alone.activations


def test_ranks_that_share_sequences_make_replicas_fewer() -> None:
    parallel = config(parallel={"context": 2, "tensor": 3}).parallel
    assert check_model_split(parallel, SHAPE, "bf16", 12) == 2
    with pytest.raises(
        ValueError, match=r"^parallel: found tensor 3 x context 2 x pipeline 1 = 6 processes on"
    ):
        check_model_split(parallel, SHAPE, "bf16", 9)


def test_what_context_parallelism_does_not_take(monkeypatch: pytest.MonkeyPatch) -> None:
    two = {"parallel": {"context": 2}}
    check(config(**two), SHAPE, 2)
    with pytest.raises(
        ValueError, match=r"^parallel.context: found 2 with a model with experts, accepted: 1"
    ):
        check(config(**two), WITH_EXPERTS, 2)
    with pytest.raises(
        ValueError, match=r"^micro_batch_tokens: found 100000 with parallel.context 2, accepted"
    ):
        check(config(**two, micro_batch_tokens=100_000), SHAPE, 2)
    for name in ("expert", "distributed_optimizer_instances"):
        with pytest.raises(
            ValueError, match=rf"parallel.context: found 2 with parallel.{name} 2, accepted: 1"
        ):
            config(parallel={"context": 2, name: 2})
    monkeypatch.setattr(layout, "transformer_engine_layers", lambda: True)
    with pytest.raises(
        ValueError, match=r"^parallel.context: found 2 with dtype fp32 and Transformer Engine"
    ):
        check(config(**two, model={"path": "m", "dtype": "fp32"}), SHAPE, 2)
    with pytest.raises(ValueError, match=r"^parallel.context: found 2 with a sliding window and Transformer"):
        check(config(**two), replace(SHAPE, sliding_window=4096), 2)
    check(config(**two, rollout={"max_new_tokens": 28, "backend": "vllm"}), SHAPE, 2)
    with pytest.raises(
        ValueError, match=r"^rollout.backend: found megatron with parallel.context 2 and Trans"
    ):
        check(config(**two), SHAPE, 2)
