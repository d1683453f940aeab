"""Every gradient strategy in one process against transformers and torch.autograd in float64."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.engine.megatron.gradients.no_rows import nearest_gram, proportion
from gapo_mega.engine.megatron.gradients.passes import SeparatePasses
from gapo_mega.types import Experience
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.policy_gradients import PARTS, RATE, SGD, WHOLE, Reference, engine_of, flat
from tests.helpers.ranks import check_engine
from tests.helpers.tiny import tiny_llama

# (gradients section, microbatch size, share of ||g_i|| ||g_j|| that the Gram matrix may be off by).
# fp32 sums in another order give 1e-7 a term, hence 1e-5; the cosines of `single` come from a difference of
# numbers near 2, each good to 1e-6. bf16 rows round every element by up to 2^-9.
FULL: list[tuple[str, dict[str, Any], int, float]] = [
    ("separate", {"forward": "separate"}, PARTS, 1e-5),
    ("shared", {"forward": "shared"}, WHOLE, 1e-5),
    ("in turns", {"forward": "shared"}, PARTS, 1e-5),
    ("one pass", {"forward": "one_pass"}, WHOLE, 1e-5),
    ("one pass in parts", {"forward": "one_pass"}, PARTS, 1e-5),
    ("bf16 rows", {"forward": "separate", "store_dtype": "bf16"}, PARTS, 2.0**-8),
    ("single", {"store": "single", "forward": "separate"}, PARTS, 1e-5),
    ("single shared", {"store": "single", "forward": "shared"}, WHOLE, 1e-5),
]
SCOPED: list[tuple[str, dict[str, Any], int, float]] = [
    ("last layer", {"scope": "last_layer", "forward": "separate"}, PARTS, 1e-5),
    ("last layer shared", {"scope": "last_layer", "forward": "shared"}, WHOLE, 1e-5),
    ("last block", {"scope": "last_block", "forward": "separate"}, PARTS, 1e-5),
    ("last block shared", {"scope": "last_block", "forward": "shared"}, WHOLE, 1e-5),
    ("layers", {"scope": [[0, 1], [2, 3]], "forward": "separate"}, PARTS, 1e-5),
    ("layers shared", {"scope": [[0, 1], [2, 3]], "forward": "shared"}, WHOLE, 1e-5),
]
CASES = [pytest.param(*case[1:], id=case[0]) for case in FULL + SCOPED]


@pytest.fixture(scope="module", params=["untied", "tied"])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("strategies") / request.param
    tiny_llama(directory, tied=request.param == "tied")
    return directory


@pytest.mark.parametrize(("gradients", "micro_batch", "tolerance"), CASES)
def test_against_autograd(
    model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int, tolerance: float
) -> None:
    """Losses, Gram matrix and update of the first step, then the Gram matrix of the second."""
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "one")
        second = engine.update_policy(batch, check_engine.loss, aggregator)
    reference = Reference(model, batch)
    scope = gradients.get("scope", "full")
    rows = reference.rows(scope)
    torch.testing.assert_close(torch.tensor(report.losses).double(), reference.losses, rtol=1e-5, atol=1e-6)
    assert gram_error(report.gram, rows @ rows.T) <= tolerance
    start = torch.cat([p.detach().flatten() for p in reference.model.parameters()])
    expected = RATE * (aggregator(rows @ rows.T) @ reference.rows())
    difference = (flat(tmp_path / "one") - start + expected).norm() / expected.norm()
    # The weights follow the Gram matrix's error and the change is a difference of fp32 parameters.
    assert float(difference) <= 10 * tolerance + 1e-4
    after = Reference(tmp_path / "one", batch).rows(scope)
    assert gram_error(second.gram, after @ after.T) <= 10 * tolerance


STRATEGIES = [pytest.param(*case[1:3], id=case[0]) for case in (*FULL[:3], *FULL[4:], *SCOPED[:2], SCOPED[4])]


@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
def test_losses_that_are_not_finite(
    model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int
) -> None:
    """The step is skipped with the objective's name, and leaves nothing behind for the next one."""
    aggregator = aggregation.build("gapo", p=1)

    def broken(logprobs_BT: Tensor, part: Experience, objective: int) -> Tensor:
        value = check_engine.loss(logprobs_BT, part, objective)
        return value * float("nan") if objective == 1 else value

    with engine_of(model, gradients, micro_batch, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        before = [p.detach().clone() for p in engine.policy.model.parameters()]
        report = engine.update_policy(batch, broken, aggregator)
        assert report.skipped and report.nonfinite == [1]
        for old, new in zip(before, engine.policy.model.parameters(), strict=True):
            assert torch.equal(old, new)
        after = engine.update_policy(batch, check_engine.loss, aggregator)
    assert not after.skipped and bool(after.gram.isfinite().all())


def test_a_gradient_that_is_not_finite_outside_the_scope(model: Path) -> None:
    """The Gram matrix of the output layer does not see it; nothing may reach the parameters."""
    with engine_of(model, {"scope": "last_layer", "forward": "shared"}, WHOLE, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        parameters = list(engine.policy.model.parameters())
        before = [p.detach().clone() for p in parameters]
        norm = next(p for name, p in engine.policy.model.named_parameters() if "layers.0.input" in name)
        handle = norm.register_hook(lambda grad: grad * float("inf"))
        report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
        handle.remove()
        assert report.skipped and bool(report.gram.isfinite().all())
        for old, new in zip(before, parameters, strict=True):
            assert torch.equal(old, new)
        assert not engine.update_policy(batch, check_engine.loss, aggregation.build("gapo")).skipped


@pytest.mark.parametrize(("gradients", "micro_batch"), STRATEGIES)
def test_an_objective_without_a_gradient(model: Path, gradients: dict[str, Any], micro_batch: int) -> None:
    """It is left out, and the others' weights are those of the others alone."""
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        assert batch.advantages_MBT is not None
        batch.advantages_MBT[0] = 0.0
        report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo", p=1))
    assert report.excluded == [0] and float(report.weights[0]) == 0.0
    others = aggregation.build("gapo", p=1)(report.gram[1:, 1:])
    torch.testing.assert_close(report.weights[1:], others, rtol=1e-9, atol=0)


def test_actual_change_after_clipping_and_in_a_corner(model: Path, tmp_path: Path) -> None:
    """Clipping changes what the buffer holds; an objective without weight has a change like any other."""
    settings = {"actual_change": True, "forward": "shared"}
    clipped = {**SGD, "clip_grad": 0.01}
    with engine_of(model, settings, PARTS, clipped) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo", p=1))
        engine.export_hf(tmp_path / "one")
        # After an even number of microbatches in turns the buffer holds the first objective's sum.
        weights = aggregation.build("weighted_sum", weights=[0.0, 1.0, 0.3])
        corner = engine.update_policy(batch, check_engine.loss, weights)
        engine.export_hf(tmp_path / "two")
    assert report.clip_factor < 0.5
    for found, start, end in (
        (report, model, tmp_path / "one"),
        (corner, tmp_path / "one", tmp_path / "two"),
    ):
        rows, change = Reference(start, batch).rows(), flat(start) - flat(end)
        size = rows.norm(dim=1) * change.norm()
        # A clipped change is small beside the fp32 parameters that it is a difference of.
        difference = torch.tensor(found.actual_change, dtype=torch.float64) - rows @ change
        assert bool((difference.abs() <= 1e-3 * size).all())
    weighted = corner.weights[:, None] * Reference(tmp_path / "one", batch).rows()
    assert corner.gradient_norm == pytest.approx(float(weighted.sum(0).norm()), rel=1e-5)


def test_proportion() -> None:
    assert proportion([0.2, 0.4], [1.0, 2.0]) == pytest.approx(0.2)
    assert proportion([0.2, 0.4 * (1 + 1e-6)], [1.0, 2.0]) is None
    assert proportion([0.2, 0.0, 0.4], [1.0, 0.0, 2.0]) == pytest.approx(0.2)
    assert proportion([0.2, 0.1, 0.4], [1.0, 0.0, 2.0]) is None
    assert proportion([0.2, 0.0], [1.0, 2.0]) is None
    assert proportion([0.0, 0.0], [1.0, 2.0]) == 0.0


def test_nearest_gram() -> None:
    """Three cosines of no vectors, by a rounding of 1e-6, become those of vectors."""
    impossible = torch.full((3, 3), -0.5 - 1e-6, dtype=torch.float64).fill_diagonal_(1.0)
    assert float(torch.linalg.eigvalsh(impossible)[0]) < -1e-6
    fixed = nearest_gram(impossible)
    assert float(torch.linalg.eigvalsh(fixed)[0]) >= -1e-15
    assert torch.allclose(fixed.diagonal(), torch.ones(3).double(), rtol=0, atol=1e-15)
    assert float((fixed - impossible).abs().max()) <= 2e-6
    possible = torch.eye(3, dtype=torch.float64)
    assert torch.equal(nearest_gram(possible), possible)
    broken = torch.eye(2, dtype=torch.float64) * math.nan
    assert bool(nearest_gram(broken).isnan().any())


def test_single_leaves_out_the_last_pass_where_it_can(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Two objectives and gapo with p = 1: three passes; mgda needs the fourth."""
    counted: list[int] = []
    original = SeparatePasses.gradient

    def counting(self: SeparatePasses, *arguments: Any, **options: Any) -> None:
        counted.append(1)
        original(self, *arguments, **options)

    monkeypatch.setattr(SeparatePasses, "gradient", counting)
    two = [{"name": "a"}, {"name": "b"}]
    single = {"store": "single", "forward": "separate"}
    for method, passes in (("gapo", 3), ("mgda", 4)):
        with engine_of(model, single, PARTS, SGD, objectives=two) as engine:
            batch = check_engine.local_part(check_engine.global_batch(200), engine)
            counted.clear()
            engine.update_policy(batch, check_engine.loss, aggregation.build(method))
        assert len(counted) == passes


@pytest.mark.parametrize("gradients", [{}, {"store": "single"}, {"scope": "last_layer"}])
def test_one_objective(model: Path, tmp_path: Path, gradients: dict[str, Any]) -> None:
    """Plain PPO comes out."""
    with engine_of(model, gradients, WHOLE, SGD, objectives=[{"name": "a"}]) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        engine.update_policy(batch, check_engine.loss, aggregation.build("weighted_sum", weights=[1.0]))
        engine.export_hf(tmp_path / "one")
    expected = RATE * Reference(model, batch).rows()[0]
    assert float((flat(model) - flat(tmp_path / "one") - expected).norm() / expected.norm()) <= 1e-4
