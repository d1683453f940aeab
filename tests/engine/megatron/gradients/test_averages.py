"""Weights from running means of gradients against float64, over several updates of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega import aggregation
from gapo_mega.engine.megatron.gradients.metric import inner_products
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from tests.helpers.averages import assert_as_reference
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.policy_gradients import PARTS, SGD, WHOLE, engine_of
from tests.helpers.ranks import check_averages

FORWARDS = [
    pytest.param({"forward": "separate"}, PARTS, id="separate"),
    pytest.param({"forward": "shared"}, WHOLE, id="shared"),
    pytest.param({"forward": "shared"}, PARTS, id="in turns"),
    pytest.param({"forward": "one_pass"}, PARTS, id="one pass"),
    # Its row of Megatron's buffer changes places with another one before it is overwritten.
    pytest.param({"forward": "separate", "actual_change": True}, PARTS, id="actual change"),
]


def run(model: Path, gradients: dict[str, Any], micro_batch: int, **more: Any) -> dict[str, Any]:
    average = more.pop("aggregation", {})
    sections = {
        "gradients": gradients,
        "micro_batch_size": micro_batch,
        "aggregation": {"average": check_averages.AVERAGE, **average},
    }
    arguments = {"model": str(model), "layout": {}, "optimizer": SGD, "sections": sections, **more}
    return check_averages.run(arguments)


@pytest.mark.parametrize(("gradients", "micro_batch"), FORWARDS)
def test_against_float64(model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int) -> None:
    found = run(model, gradients, micro_batch, export=str(tmp_path))
    assert_as_reference(found, tmp_path, 1e-5)


def test_means_in_bf16(model: Path, tmp_path: Path) -> None:
    """Every update rounds a mean by up to 2^-9 of its elements."""
    found = run(
        model, {"forward": "one_pass"}, WHOLE, export=str(tmp_path), aggregation={"average_dtype": "bf16"}
    )
    assert_as_reference(found, tmp_path, 2.0**-8)


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_checkpoint_goes_on_bit_for_bit(model: Path, tmp_path: Path, dtype: str) -> None:
    average = {"average_dtype": dtype}
    gradients = {"forward": "one_pass"}
    expected = run(model, gradients, PARTS, save=str(tmp_path), aggregation=average)
    found = run(model, gradients, PARTS, load=str(tmp_path), aggregation=average)
    for key in ("weights", "gram", "averaged"):
        assert found[key] == expected[key][check_averages.SAVED :]


def test_a_checkpoint_without_means_is_refused(model: Path, tmp_path: Path) -> None:
    run(model, {}, PARTS, save=str(tmp_path), aggregation={"average": 0.0})
    with pytest.raises(ValueError, match=r"aggregation\.average cannot change"):
        run(model, {}, PARTS, load=str(tmp_path))


def test_a_step_that_megatron_might_not_take_leaves_the_means_alone(model: Path) -> None:
    """The weights are fine, and the squares of what they combine to leave float32."""
    huge = aggregation.build("weighted_sum", weights=[1e25] * 3)
    sections = {"aggregation": {"average": 0.5}}
    with engine_of(model, {"forward": "separate"}, PARTS, SGD, **sections) as engine:
        averages = engine.gradients.averages
        assert averages is not None
        batch = check_averages.batch_of(0)
        assert not engine.update_policy(batch, check_averages.reinforce, check_averages.method()).skipped
        before = [piece.clone() for row in averages.rows for piece in row]
        report = engine.update_policy(batch, check_averages.reinforce, huge)
        assert report.skipped and report.reason is not None and "Megatron can measure" in report.reason
        assert averages.updates == 1
        for old, new in zip(before, (piece for row in averages.rows for piece in row), strict=True):
            assert torch.equal(old, new)


@pytest.mark.parametrize("metric", ["euclidean", "adam"])
def test_the_means_gram_is_that_of_the_means(model: Path, metric: str) -> None:
    """What was computed before the means were written is what they give afterwards."""
    optimizer = {"lr": 1e-3}
    sections = {"aggregation": {"average": 0.5}}
    with engine_of(model, {"forward": "one_pass", "metric": metric}, PARTS, optimizer, **sections) as engine:
        strategy = engine.gradients
        assert strategy.averages is not None
        for step in range(2):
            engine.update_policy(
                check_averages.batch_of(step), check_averages.reinforce, check_averages.method()
            )
        (inner,) = engine.policy.optimizer.chained_optimizers
        moments = [state["exp_avg_sq"].clone() for state in inner.optimizer.state.values()]
        report = engine.update_policy(
            check_averages.batch_of(2), check_averages.reinforce, check_averages.method()
        )
        # The metric as it was before the step, by which the update went.
        for state, moment in zip(inner.optimizer.state.values(), moments, strict=True):
            state["exp_avg_sq"].copy_(moment)
            state["step"] -= 1
        with megatron_device():
            found = inner_products(strategy.shard, strategy.averages.rows, strategy.metric())
    assert report.averaged_gram is not None
    expected = found / (1 - 0.5**3) ** 2
    # The means are rounded to fp32, 2^-24 an element.
    assert gram_error(report.averaged_gram, expected) <= 1e-6


def test_more_rows_than_the_kernel_takes(model: Path) -> None:
    with engine_of(model, {}, PARTS, SGD) as engine, megatron_device():
        shard = engine.gradients.shard
        generator = torch.Generator().manual_seed(1)
        rows = [[torch.randn(p.shape, generator=generator) for p in shard.pieces] for _ in range(21)]
        found = inner_products(shard, rows)
        flat = torch.stack([torch.cat([piece.double() for piece in row]) for row in rows])
        counted = torch.zeros(shard.numel, dtype=torch.bool)
        for start, end in shard.segments:
            counted[start:end] = True
        expected = flat[:, counted] @ flat[:, counted].t()
    torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-8)
