"""One pass against one backward per objective through the same model, row by row."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from torch import Tensor

from gapo_mega.engine.base import PolicyLossSum
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.gradients import accumulator, capture
from gapo_mega.engine.megatron.gradients.one_pass import OnePass
from gapo_mega.engine.megatron.gradients.passes import Task
from gapo_mega.engine.megatron.model.experts import Router
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.model.modules import RMSNorm
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.one_pass import by_token, clipped, rows_one_by_one, rows_together, unclipped
from tests.helpers.policy_gradients import PARTS, SGD, WHOLE, engine_of
from tests.helpers.ranks import check_engine
from tests.helpers.tiny import tiny_llama, tiny_mixtral, tiny_qwen2, tiny_qwen3, tiny_qwen3_moe

OBJECTIVES, VOCABULARY = check_engine.OBJECTIVES, 200
# fp32 sums in another order, on matrices of some tens of rows: 1e-7 a term. Relative to a row's norm.
ROW_ERROR, GRAM_ERROR = 1e-5, 2e-6
DENSE: dict[str, Callable[[Path], object]] = {
    "llama": tiny_llama,
    "tied": lambda directory: tiny_llama(directory, tied=True),
    "qwen2": tiny_qwen2,  # biases
    "qwen3": tiny_qwen3,  # norms of queries and keys
}
WITH_EXPERTS: dict[str, Callable[[Path], object]] = {"mixtral": tiny_mixtral, "qwen3_moe": tiny_qwen3_moe}
MODELS = DENSE | WITH_EXPERTS


@pytest.fixture(scope="module", params=MODELS)
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("one_pass") / str(request.param)
    MODELS[request.param](directory)
    return directory


def with_penalty(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """A KL term in every objective's loss."""
    drift_BT = (logprobs_BT - batch.old_logprobs_BT) * batch.response_mask_BT
    return unclipped(logprobs_BT, batch, objective) + 0.1 * drift_BT.square().sum()


def corrected(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """Every objective's advantages with the same weights of tokens, some of them 0."""
    assert batch.advantages_MBT is not None
    weights_BT = (1.0 + 2.0 * torch.cos(torch.arange(logprobs_BT.shape[1]) * 1.0)).clamp(min=0.0)
    weighted = dataclasses.replace(batch, advantages_MBT=batch.advantages_MBT * weights_BT)
    return unclipped(logprobs_BT, weighted, objective)


def of_one_sequence(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """The last objective has no gradient but in the last sequence."""
    total_B = (logprobs_BT * batch.response_mask_BT).sum(dim=1)
    chosen_B = torch.arange(len(total_B)) == len(total_B) - 1
    return -(total_B * (chosen_B if objective == OBJECTIVES - 1 else 1.0)).sum()


# Backward passes for every microbatch.
LOSSES: dict[str, tuple[PolicyLossSum, int]] = {
    "unclipped": (unclipped, 1),
    "clipped": (clipped, 2),
    "with_penalty": (with_penalty, 2),
    "corrected": (corrected, 1),
    "by_token": (by_token, OBJECTIVES),
    "of_one_sequence": (of_one_sequence, 1),
}
PASSES = [(WHOLE, "none"), (PARTS, "none"), (WHOLE, "selective"), (PARTS, "full")]
CASES = [(model, loss, *passes) for passes in PASSES for loss in LOSSES for model in DENSE]
# What experts add is the same for every loss: each with some passes.
CASES += [
    ("mixtral", "unclipped", WHOLE, "none"),
    ("mixtral", "clipped", PARTS, "full"),
    ("mixtral", "of_one_sequence", PARTS, "none"),
    ("qwen3_moe", "corrected", PARTS, "none"),
    ("qwen3_moe", "with_penalty", WHOLE, "none"),
    ("qwen3_moe", "by_token", WHOLE, "selective"),
]


def task_of(engine: MegatronEngine, loss: PolicyLossSum, micro_batch: int) -> Task:
    batch = check_engine.local_part(check_engine.global_batch(VOCABULARY), engine)
    tokens = float(batch.response_mask_BT.sum())
    return Task(batch.split(micro_batch), loss, tokens, Distribution(VOCABULARY), OBJECTIVES)


@pytest.mark.parametrize(("model", "name", "micro_batch", "recompute"), CASES, indirect=["model"])
def test_rows(
    model: Path, name: str, micro_batch: int, recompute: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    loss, expected = LOSSES[name]
    settings = {"model": {"recompute": recompute}}
    with engine_of(model, {"forward": "one_pass"}, micro_batch, SGD, **settings) as engine:
        strategy = engine.gradients
        assert isinstance(strategy, OnePass)
        task = task_of(engine, loss, micro_batch)
        taken: list[Tensor] = []
        take = strategy._accumulator.take

        def counting(coefficients_MB: Tensor, device: torch.device, only: int | None = None) -> None:
            taken.append(coefficients_MB)
            take(coefficients_MB, device, only)

        monkeypatch.setattr(strategy._accumulator, "take", counting)
        with megatron_device():
            alone = rows_one_by_one(engine, task)
            measured = []
            for short in (0, 1 << 20):  # tiles, then products for every row, which find what tiles left there
                monkeypatch.setattr(accumulator, "_SHORT", {"cpu": short})
                rows, losses = rows_together(strategy, task, Clock())
                measured.append(rows)
            found = [
                task.loss(logprobs_BT, part, k)
                for part, logprobs_BT in logprobs(engine, task)
                for k in range(OBJECTIVES)
            ]
    norms = alone.norm(dim=1)
    for together in measured:
        assert bool(((together - alone).norm(dim=1) <= ROW_ERROR * norms).all())
        assert gram_error(together @ together.T, alone @ alone.T) <= GRAM_ERROR
    assert len(taken) <= 2 * expected * len(task.microbatches)
    assert micro_batch == PARTS or len(taken) == 2 * expected
    expected_losses = torch.stack(found).view(-1, OBJECTIVES).double().sum(dim=0) / task.divisor
    torch.testing.assert_close(losses, expected_losses, rtol=1e-5, atol=1e-6)


def logprobs(engine: MegatronEngine, task: Task) -> Iterator[tuple[Experience, Tensor]]:
    for part in task.microbatches:
        yield part, engine.logprobs(part, "policy")


def test_one_objective_alone_is_not_finite(model: Path) -> None:
    """The others keep their rows."""

    def broken(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        return unclipped(logprobs_BT, batch, objective) * (float("nan") if objective == 1 else 1.0)

    with engine_of(model, {"forward": "one_pass"}, PARTS, SGD) as engine:
        strategy = engine.gradients
        assert isinstance(strategy, OnePass)
        with megatron_device():
            alone = rows_one_by_one(engine, task_of(engine, unclipped, PARTS))
            together, _ = rows_together(strategy, task_of(engine, broken, PARTS), Clock())
    for index in (0, 2):
        assert float((together[index] - alone[index]).norm()) <= ROW_ERROR * float(alone[index].norm())
    assert bool(together[1].isnan().any())


def test_the_model_is_as_before(model: Path) -> None:
    """Nothing stays frozen, replaced or hooked, also where a loss raises."""

    def raising(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        raise KeyError("a user's own")

    with engine_of(model, {"forward": "one_pass"}, PARTS, SGD) as engine:
        gpt = engine.policy.model.module
        task = task_of(engine, raising, PARTS)
        with megatron_device():
            with pytest.raises(KeyError, match="a user's own"):
                engine.gradients.measure(task, Clock())  # type: ignore[attr-defined]
            assert not any("_forward_impl" in vars(module) for module in gpt.modules())
            assert not any("scale" in vars(norm) for norm in gpt.modules() if isinstance(norm, RMSNorm))
            assert not any(
                "product" in vars(router) for router in gpt.modules() if isinstance(router, Router)
            )
            layers = [layer for layer in gpt.modules() if isinstance(layer, MoELayer)]
            assert all(layer.token_dispatcher.watch is None for layer in layers)
            assert all(parameter.requires_grad for parameter in engine.policy.parameters())
            assert not any(module._forward_hooks for module in gpt.modules())
            # An ordinary backward fills Megatron's own buffer.
            alone = rows_one_by_one(engine, dataclasses.replace(task, loss=unclipped))
        assert bool((alone.norm(dim=1) > 0).all())


def test_a_module_that_hands_over_nothing_is_named(model: Path) -> None:
    with engine_of(model, {"forward": "separate"}, WHOLE, SGD) as engine:
        gpt = engine.policy.model.module
        assert capture.refusal([gpt]) is None
        gpt.decoder.adapter = torch.nn.Linear(2, 2)
        message = "the parameter decoder.adapter.weight, whose module hands over no gradients of sequences"
        assert capture.refusal([gpt]) == message
