"""Weights of a safe scalarizer against SciPy's least squares, and who may be asked for them."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.optimize import nnls
from torch import Tensor

from gapo_mega.scalarization import Weighted, build, scalarizers
from gapo_mega.scalarization.safe import SafeWeights

WEIGHTED = sorted(name for name, kind in scalarizers().items() if issubclass(kind, Weighted))
OTHERS = sorted(set(scalarizers()) - set(WEIGHTED))


def opposed(count: int, seed: int) -> Tensor:
    """Gradients of norms within a factor 10, the first against the sum of the others."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(count, count + 2, generator=generator, dtype=torch.float64)
    rows[0] = -rows[1:].sum(dim=0) + 0.5 * rows[0]
    return rows * torch.logspace(0, 1, count, dtype=torch.float64)[:, None]


def nearest(rows: np.ndarray, given: np.ndarray) -> np.ndarray:
    """``given + x`` with ``x = argmin ||rows' (given + x)||, x >= 0``, by SciPy."""
    found, _ = nnls(rows.T, -rows.T @ given)
    weights: np.ndarray = given + found
    return weights


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize(
    "given", [[0.5, 0.5], [0.9, 0.1], [0.0, 1.0], [1.0, 0.5, 0.25], [1.0, 0.0, 0.0], [0.8, -0.3, 0.5]]
)
def test_the_nearest_direction_that_hurts_nobody(given: list[float], seed: int) -> None:
    """Also from a weight of 0 and from one below it: that objective is not followed, and not hurt."""
    rows = opposed(len(given), seed)
    method = SafeWeights()
    method.take(torch.tensor(given, dtype=torch.float64))
    found = method(rows @ rows.T).numpy()
    expected = nearest(rows.numpy(), np.array(given))
    size = float(np.abs(rows.numpy()).max())
    # Of directions, in units of the gradients: conditions stay below 1e6.
    np.testing.assert_allclose(rows.numpy().T @ found, rows.numpy().T @ expected, atol=1e-9 * size)
    assert (rows.numpy() @ rows.numpy().T @ found >= -1e-9 * size**2).all()


def test_a_sum_that_hurts_nobody_stays_as_it_is() -> None:
    method = SafeWeights()
    method.take(torch.tensor([0.7, 0.3], dtype=torch.float64))
    gram = torch.tensor([[1.0, 0.5], [0.5, 4.0]], dtype=torch.float64)
    assert method(gram).tolist() == [0.7, 0.3]
    method.take(torch.tensor([0.2, 0.1]))  # of the next rollout, in float32
    assert method(gram).tolist() == torch.tensor([0.2, 0.1]).double().tolist()


def test_an_objective_without_a_gradient_has_no_weight() -> None:
    method = SafeWeights()
    method.take(torch.tensor([0.2, 0.5, 0.3], dtype=torch.float64))
    gram = torch.zeros(3, 3, dtype=torch.float64)
    gram[::2, ::2] = torch.tensor([[1.0, -0.5], [-0.5, 1.0]])
    found = method(gram)
    rows = np.array([[1.0, 0.0], [-0.5, np.sqrt(0.75)]])
    np.testing.assert_allclose(found[::2].numpy(), nearest(rows, np.array([0.2, 0.3])), rtol=1e-12)
    assert found[1] == 0
    assert SafeWeights()(gram).tolist() == [0.5, 0, 0.5], "until a rollout, all that take part are alike"


def test_all_weights_zero_are_no_step() -> None:
    method = SafeWeights()
    method.take(torch.zeros(2, dtype=torch.float64))
    assert method(torch.eye(2, dtype=torch.float64)).tolist() == [0.0, 0.0]


def test_weights_beyond_float32_blame_the_option() -> None:
    method = SafeWeights()
    method.take(torch.tensor([0.5, 0.5], dtype=torch.float64))
    with pytest.raises(ValueError, match=r"^scalarization\.options\.safe: found true, .*; accepted: false,"):
        method(torch.tensor([[1.0, -0.5e-42], [-0.5e-42, 1e-84]], dtype=torch.float64))


@pytest.mark.parametrize("name", WEIGHTED)
def test_every_scalarizer_that_weighs_scores_has_the_option(name: str) -> None:
    scalarizer = build(name, safe=True)
    assert isinstance(scalarizer, Weighted) and scalarizer.safe
    for wrong in (1, "yes", None):
        with pytest.raises(ValueError, match=rf"^scalarization\.options \({name}\): safe: found {wrong!r}, "):
            build(name, safe=wrong)


@pytest.mark.parametrize("name", OTHERS)
def test_a_scalarizer_of_advantages_has_no_weights_to_make_safe(name: str) -> None:
    said = (
        rf"^scalarization\.options\.safe: found true with {name}, which gives no weights .*; accepted: with "
        rf"{', '.join(WEIGHTED)}, or .* weighted_sum with options safe and advantages\.name grpo"
    )
    with pytest.raises(ValueError, match=said) as caught:
        build(name, safe=True)
    assert "\n" not in str(caught.value)
