"""Policies with experts in one process against transformers and torch.autograd in float64."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from gapo_mega import aggregation
from gapo_mega.models import HFDirectory, shape_of
from tests.helpers import resolved
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.policy_gradients import PARTS, RATE, SGD, WHOLE, Reference, engine_of, flat
from tests.helpers.ranks import check_engine
from tests.helpers.tiny import tiny_mixtral, tiny_qwen3_moe

# As for models without experts: fp32 against float64, and cosines of `single` from a difference near 2.
CASES: list[tuple[str, dict[str, Any], int]] = [
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


def test_auto_takes_the_next_best_and_one_pass_is_refused(model: Path) -> None:
    """One pass sums a layer's gradients by sequence, and an expert's tokens are of all sequences."""
    with engine_of(model, {"forward": "auto"}, WHOLE, SGD) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        assert "forward" in engine.update_policy(batch, check_engine.loss, aggregation.build("gapo")).seconds
    config = check_engine.make_config(str(model), {}, SGD, gradients={"forward": "one_pass"})
    shape = shape_of(HFDirectory(model).config)
    with pytest.raises(ValueError, match=r"^gradients\.forward: found one_pass with a model with experts"):
        resolved.check(config, shape, 1)
