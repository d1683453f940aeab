"""The engine asks an aggregator once a step, and tells it of the steps that the optimizer took."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation, ops
from gapo_mega.aggregation import HostMethod, Solution, ZeroGradientError
from gapo_mega.engine.base import GradientReport
from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.types import Experience
from tests.helpers.aggregators import OnDevice, OnHost, Recorded, Remembering
from tests.helpers.policy_gradients import PARTS, SGD, WHOLE, engine_of
from tests.helpers.ranks import check_engine

STRATEGIES = [
    pytest.param({"forward": "separate"}, PARTS, id="separate"),
    pytest.param({"forward": "shared"}, PARTS, id="in turns"),
    pytest.param({"store": "single", "forward": "separate"}, PARTS, id="single"),
    pytest.param({"scope": "last_layer", "forward": "shared"}, WHOLE, id="last layer"),
]
LAST_LAYER = {"scope": "last_layer", "forward": "shared"}


def broken(logprobs_BT: Tensor, part: Experience, objective: int) -> Tensor:
    """The second objective's loss is NaN."""
    value = check_engine.loss(logprobs_BT, part, objective)
    return value * float("nan") if objective == 1 else value


def batch_of(engine: MegatronEngine) -> Experience:
    return check_engine.local_part(check_engine.global_batch(200), engine)


def assert_same_memory(found: Remembering, expected: Remembering) -> None:
    assert found.before is not None and expected.before is not None
    assert torch.equal(found.before, expected.before)


@pytest.mark.parametrize("kind", [OnHost, OnDevice])
@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
def test_a_skipped_minibatch_leaves_no_trace(
    model: Path, gradients: dict[str, Any], micro_batch: int, kind: type[Remembering]
) -> None:
    """Weights and memory after good, bad, good are those after good, good, to the last bit."""

    def run(losses: list[Any]) -> tuple[list[GradientReport], Recorded, Remembering]:
        memory = kind()
        recorded = Recorded(memory)
        with engine_of(model, gradients, micro_batch, SGD) as engine:
            batch = batch_of(engine)
            return [engine.update_policy(batch, loss, recorded) for loss in losses], recorded, memory

    reports, recorded, memory = run([check_engine.loss, broken, check_engine.loss])
    expected_reports, expected, expected_memory = run([check_engine.loss, check_engine.loss])
    assert [report.skipped for report in reports] == [False, True, False]
    assert len(recorded.answers) == 3
    assert recorded.committed == [recorded.answers[0], recorded.answers[2]]
    assert expected.committed == expected.answers
    assert torch.equal(reports[2].gram, expected_reports[1].gram)
    assert torch.equal(reports[2].weights, expected_reports[1].weights)
    # The memory counts: without it the last weights would be others.
    assert not torch.allclose(reports[2].weights, kind()(reports[2].gram), rtol=1e-3)
    assert_same_memory(memory, expected_memory)


def test_weights_of_a_step_that_the_optimizer_did_not_take_are_not_committed(model: Path) -> None:
    """The Gram matrix of the output layer is finite and has weights; the combined gradient is not."""
    recorded = Recorded(OnHost())
    with engine_of(model, LAST_LAYER, WHOLE, SGD) as engine:
        batch = batch_of(engine)
        norm = next(p for name, p in engine.policy.model.named_parameters() if "layers.0.input" in name)
        handle = norm.register_hook(lambda grad: grad * float("inf"))
        report = engine.update_policy(batch, check_engine.loss, recorded)
        handle.remove()
        assert report.skipped and recorded.answers[0].ok()
        assert recorded.committed == []
        assert not engine.update_policy(batch, check_engine.loss, recorded).skipped
    assert recorded.committed == [recorded.answers[1]]


def failing_step(engine: MegatronEngine, batch: Experience, recorded: Recorded) -> ValueError:
    """The error of a step that has no weights; the parameters are as they were."""
    before = [p.detach().clone() for p in engine.policy.model.parameters()]
    with pytest.raises(ValueError) as caught:
        engine.update_policy(batch, check_engine.loss, recorded)
    assert len(recorded.answers) == 1
    assert recorded.committed == []
    for old, new in zip(before, engine.policy.model.parameters(), strict=True):
        assert torch.equal(old, new)
    return caught.value


@pytest.mark.parametrize("kind", [OnHost, OnDevice])
@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
def test_a_zero_gradient_is_told_in_words_without_asking_again(
    model: Path, gradients: dict[str, Any], micro_batch: int, kind: type[Remembering]
) -> None:
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        batch = batch_of(engine)
        assert batch.advantages_MBT is not None
        batch.advantages_MBT[0] = 0.0
        error = failing_step(engine, batch, Recorded(kind(zero_gradient="stop")))
    assert isinstance(error, ZeroGradientError)
    assert error.objectives == [0]
    assert str(error) == (
        "gram: the gradients of objectives [0] are zero and zero_gradient is 'stop'; "
        "set zero_gradient: exclude to go on with the others"
    )


def test_weights_beyond_double_precision_are_told_in_words_without_asking_again(model: Path) -> None:
    method = aggregation.build("gapo", p=1e4)
    recorded = Recorded(method)
    with engine_of(model, {"forward": "separate"}, PARTS, SGD) as engine:
        error = failing_step(engine, batch_of(engine), recorded)
    with pytest.raises(ValueError, match=r"scale: found 'none', with which gapo gives the weights") as asked:
        method(recorded.answers[0].gram)
    assert str(error) == str(asked.value)


def test_any_function_of_the_gram_matrix_will_do(model: Path) -> None:
    seen: list[Tensor] = []

    def halves(gram: Tensor) -> Tensor:
        seen.append(gram)
        return torch.full((len(gram),), 0.5)

    with engine_of(model, {"forward": "separate"}, PARTS, SGD) as engine:
        batch = batch_of(engine)
        skipped = engine.update_policy(batch, broken, halves)
        report = engine.update_policy(batch, check_engine.loss, halves)
    assert skipped.skipped and not report.skipped
    assert report.weights.tolist() == [0.5] * check_engine.OBJECTIVES
    assert len(seen) == 1 and torch.equal(seen[0], report.gram)


class GivesUp(HostMethod):
    """A method whose search does not end."""

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        return Solution(gram.new_zeros(len(active)), status=ops.Status.NOT_CONVERGED)


def test_a_method_that_gives_up_skips_the_step_and_says_why(model: Path) -> None:
    recorded = Recorded(GivesUp())
    with engine_of(model, {"forward": "separate"}, PARTS, SGD) as engine:
        report = engine.update_policy(batch_of(engine), check_engine.loss, recorded)
    assert report.skipped and report.nonfinite == []
    assert len(recorded.answers) == 1 and recorded.committed == []
    assert report.reason == str(recorded.error(recorded.answers[0]))
    assert "not finite" not in report.reason


@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
@pytest.mark.parametrize("weight", [1e-50, 1e-40, 1e39])
def test_weights_out_of_fp32s_range_are_told_in_words_before_anything_is_updated(
    model: Path, gradients: dict[str, Any], micro_batch: int, weight: float
) -> None:
    recorded = Recorded(aggregation.build("weighted_sum", weights=[weight] * check_engine.OBJECTIVES))
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        error = failing_step(engine, batch_of(engine), recorded)
    assert str(error) == str(recorded.error(recorded.answers[0]))
    assert "scale: found 'none'" in str(error) and "outside the range of float32" in str(error)


@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
@pytest.mark.parametrize("weight", [1e-30, 1e25])
def test_weights_that_only_megatrons_norm_cannot_take_are_not_blamed_on_megatron(
    model: Path, gradients: dict[str, Any], micro_batch: int, weight: float
) -> None:
    """fp32 holds the combination, and not the squares of its elements."""
    recorded = Recorded(aggregation.build("weighted_sum", weights=[weight] * check_engine.OBJECTIVES))
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        report = engine.update_policy(batch_of(engine), check_engine.loss, recorded)
        assert report.skipped and recorded.answers[0].ok() and recorded.committed == []
        assert report.reason is not None and "which Megatron can measure in float32" in report.reason
        assert not engine.update_policy(
            batch_of(engine), check_engine.loss, lambda g: g.new_ones(len(g))
        ).skipped
