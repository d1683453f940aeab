"""Policies with experts in one process against transformers and torch.autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega import aggregation
from gapo_mega.engine.megatron.gradients.one_pass import OnePass
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.policy_gradients import PARTS, RATE, SGD, WHOLE, Reference, engine_of, flat
from tests.helpers.ranks import check_engine
from tests.helpers.router_losses import router_gradient, router_losses
from tests.helpers.tiny import tiny_mixtral, tiny_qwen3_moe

# As for models without experts: fp32 against float64, and cosines of `single` from a difference near 2.
CASES: list[tuple[str, dict[str, Any], int]] = [
    ("one pass", {"forward": "one_pass"}, PARTS),
    ("separate", {"forward": "separate"}, PARTS),
    ("shared", {"forward": "shared"}, WHOLE),
    ("in turns", {"forward": "shared"}, PARTS),
    ("single", {"store": "single", "forward": "separate"}, PARTS),
    ("last layer", {"scope": "last_layer", "forward": "shared"}, WHOLE),
    ("last block", {"scope": "last_block", "forward": "separate"}, PARTS),
]
TOLERANCE = 1e-5


@pytest.fixture(scope="module", params=[tiny_mixtral, tiny_qwen3_moe])
def model(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("experts") / "model"
    request.param(directory)
    return directory


@pytest.mark.parametrize(
    ("gradients", "micro_batch"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_against_autograd(model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int) -> None:
    """Losses, Gram matrix and update."""
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    with engine_of(model, gradients, micro_batch, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "one")
    reference = Reference(model, batch)
    rows = reference.rows(gradients.get("scope", "full"))
    torch.testing.assert_close(torch.tensor(report.losses).double(), reference.losses, rtol=1e-5, atol=1e-6)
    error = gram_error(report.gram, rows @ rows.T)
    print(f"Gram error {error:.2e}")
    assert error <= TOLERANCE
    expected = RATE * (aggregator(rows @ rows.T) @ reference.rows())
    moved = flat(model) - flat(tmp_path / "one")
    # The weights follow the Gram matrix's error and the change is a difference of fp32 parameters.
    assert float((moved - expected).norm() / expected.norm()) <= 2e-4


# Of a size that shows: the combined gradient of the routers' losses is a good part of the direction.
FACTORS = {"router_aux_loss": 0.3, "router_z_loss": 0.01}


@pytest.mark.parametrize(
    ("gradients", "micro_batch"), [pytest.param(*case[1:], id=case[0]) for case in CASES]
)
def test_the_losses_of_routers_are_added_once(
    model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int
) -> None:
    """They are in no row, whatever the weights, and weigh the same whatever the microbatches."""
    aggregator = aggregation.build("weighted_sum", weights=[0.2, 0.0, 1.7])
    with engine_of(model, gradients, micro_batch, SGD, model=FACTORS) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "one")
    reference = Reference(model, batch)
    rows = reference.rows(gradients.get("scope", "full"))
    aux, z = router_losses(reference.model, batch)
    own = router_gradient(reference.model, batch, *FACTORS.values())
    assert gram_error(report.gram, rows @ rows.T) <= TOLERANCE
    expected = {
        "router_aux_loss": aux.item(),
        "router_z_loss": z.item(),
        "router_gradient_norm": float(own.norm()),
    }
    assert report.routers == pytest.approx(expected, rel=2e-5)  # as the Gram matrix
    direction = aggregator(rows @ rows.T) @ reference.rows() + own
    assert float(own.norm() / direction.norm()) > 0.05
    moved = flat(model) - flat(tmp_path / "one")
    assert float((moved - RATE * direction).norm() / (RATE * direction.norm())) <= 2e-4


def test_recomputed_layers_add_the_losses_of_routers_once(model: Path) -> None:
    batch, norms = None, []
    for recompute in ("none", "full"):
        section = {**FACTORS, "recompute": recompute}
        with engine_of(model, {"forward": "separate"}, PARTS, SGD, model=section) as engine:
            batch = batch or check_engine.local_part(check_engine.global_batch(200), engine)
            report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
            norms.append([*report.routers.values(), report.gradient_norm])
    assert norms[0] == pytest.approx(norms[1], rel=1e-6)


def test_packed_rows_have_the_losses_of_routers(model: Path) -> None:
    """Of the same tokens, whatever their rows are."""
    data = {"source": "unused", "max_prompt_tokens": 7}
    rollout = {"prompts_per_step": 4, "samples_per_prompt": 2, "max_new_tokens": check_engine.COLUMNS - 7}
    batch, norms = None, []
    for tokens in (None, 50):
        sections = {"model": FACTORS, "micro_batch_tokens": tokens, "data": data, "rollout": rollout}
        with engine_of(model, {"forward": "separate"}, PARTS, SGD, **sections) as engine:
            batch = batch or check_engine.local_part(check_engine.global_batch(200), engine)
            report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
            norms.append([*report.routers.values(), report.gradient_norm])
    assert norms[1] == pytest.approx(norms[0], rel=2e-5)  # fp32 sums in another order; see TOLERANCE


def test_the_change_of_a_step_with_losses_of_routers(model: Path, tmp_path: Path) -> None:
    """The gradient that the combination overwrote is found again behind what routers added."""
    gradients = {"forward": "separate", "actual_change": True}
    with engine_of(model, gradients, PARTS, SGD, model=FACTORS) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        report = engine.update_policy(batch, check_engine.loss, aggregation.build("gapo"))
        engine.export_hf(tmp_path / "one")
    rows = Reference(model, batch).rows()
    moved = flat(model) - flat(tmp_path / "one")
    assert report.actual_change is not None
    found = torch.tensor(report.actual_change, dtype=torch.float64)
    # A difference of fp32 parameters, as in tests/helpers/combinations.
    assert float(((found - rows @ moved).abs() / (rows.norm(dim=1) * moved.norm())).max()) <= 1e-3


def test_auto_takes_one_pass(model: Path) -> None:
    with engine_of(model, {"forward": "auto"}, WHOLE, SGD) as engine:
        assert isinstance(engine.gradients, OnePass)
