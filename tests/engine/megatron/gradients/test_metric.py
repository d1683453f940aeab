"""Inner products in Adam's metric: what they are, and what they are for."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation
from tests.helpers.combinations.comparison import gram_error
from tests.helpers.policy_gradients import PARTS, WHOLE, Reference, engine_of, flat
from tests.helpers.ranks import check_engine, worlds
from tests.helpers.tiny import tiny_llama

EPS = 1e-4  # near the size of the gradients' elements: D stays a smooth function of them
ADAM = {"name": "adam", "lr": 1e-3, "beta1": 0.0, "beta2": 0.9, "eps": EPS}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("metric") / "model"
    tiny_llama(directory)
    yield directory
    worlds.leave()


@pytest.mark.parametrize(
    ("gradients", "micro_batch", "distributed"),
    [
        ({"forward": "separate"}, PARTS, True),
        ({"forward": "shared"}, PARTS, False),
        ({"store": "single", "forward": "shared"}, WHOLE, True),
        ({"scope": [[1, 3]], "forward": "separate"}, PARTS, True),
    ],
)
def test_gram_and_actual_change(
    model: Path, tmp_path: Path, gradients: dict[str, Any], micro_batch: int, distributed: bool
) -> None:
    """The first step is euclidean; the second has D from the first step's combined gradient alone."""
    aggregator = aggregation.build("gapo", p=1, scale="mean_norm")
    settings = {**ADAM, "distributed": distributed}
    with engine_of(model, {**gradients, "metric": "adam"}, micro_batch, settings) as engine:
        batch = check_engine.local_part(check_engine.global_batch(200), engine)
        first = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "one")
        second = engine.update_policy(batch, check_engine.loss, aggregator)
        engine.export_hf(tmp_path / "two")
    scope = gradients.get("scope", "full")
    before, after = Reference(model, batch), Reference(tmp_path / "one", batch)
    rows = before.rows(scope)
    assert gram_error(first.gram, rows @ rows.T) <= 1e-5
    # v = (1 - beta2) d^2, corrected by 1 - beta2: D = 1 / (|d| + eps), and 0 where d is 0.
    direction = first.weights @ rows
    factors = torch.where(direction == 0, 0.0, 1.0 / (direction.abs() + EPS))
    rows = after.rows(scope)
    # Where |d| is far below eps, its fp32 error is amplified by no more than 1 / eps: 1e-3 of the whole.
    assert gram_error(second.gram, (rows * factors) @ rows.T) <= 1e-3
    if scope != "full" or "store" in gradients:
        assert first.actual_change is None and second.actual_change is None
        return
    for report, reference, start, end in [
        (first, before, model, tmp_path / "one"),
        (second, after, tmp_path / "one", tmp_path / "two"),
    ]:
        change = flat(start) - flat(end)
        expected = reference.rows() @ change
        assert report.actual_change is not None
        size = reference.rows().norm(dim=1) * change.norm()
        # fp32 parameters: each change of 1e-3 is known to 1e-4 of itself, with independent errors.
        found = torch.tensor(report.actual_change, dtype=torch.float64)
        assert bool(((found - expected).abs() <= 1e-4 * size).all())


def _change_by_adam(weights: Tensor, rows: Tensor, second: Tensor) -> Tensor:
    """What torch's Adam with beta1 = 0 makes of the combined gradient, its second moment being ``second``."""
    parameter = torch.nn.Parameter(torch.zeros(rows.shape[1], dtype=torch.float64))
    # beta2 near 1 and a large step count: the step's own gradient leaves v as it is, uncorrected.
    optimizer = torch.optim.Adam([parameter], lr=1e-6, betas=(0.0, 1 - 1e-12), eps=1e-8)
    optimizer.state[parameter] = {
        "step": torch.tensor(1e15, dtype=torch.float64),
        "exp_avg": torch.zeros_like(parameter),
        "exp_avg_sq": second.clone(),
    }
    parameter.grad = weights @ rows
    optimizer.step()
    return parameter.detach()


def test_euclidean_weights_can_hurt_where_those_of_the_metric_do_not() -> None:
    """Two objectives, two parameters, Adam with beta1 = 0 and a second moment of 4 orders of magnitude.

    Linear losses L_i = <g_i, x>, so the change of a loss is exact: <g_i, change>.
    """
    rows = torch.tensor([[1.0, 1.0], [-0.2, 1.0]], dtype=torch.float64)
    second = torch.tensor([1e-4, 1.0], dtype=torch.float64)
    factors = 1.0 / (second.sqrt() + 1e-8)
    aggregator = aggregation.build("gapo", p=1)
    euclidean = aggregator(rows @ rows.T)
    metric = aggregator((rows * factors) @ rows.T)
    assert bool(((rows @ rows.T) @ euclidean > 0).all()), "plain gradient descent would hurt nobody"
    hurt = rows @ _change_by_adam(euclidean, rows, second)
    helped = rows @ _change_by_adam(metric, rows, second)
    assert float(hurt[0]) < 0 < float(hurt[1]), (
        "Adam's step along the euclidean direction raises the second loss"
    )
    assert bool((helped < 0).all())
    # The first-order prediction in the metric is what Adam did: -lr (G w)_i.
    expected = -1e-6 * ((rows * factors) @ rows.T) @ metric
    torch.testing.assert_close(helped, expected, rtol=1e-9, atol=0)
