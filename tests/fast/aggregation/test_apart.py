"""A KL row beside a method that does not see it."""

from __future__ import annotations

import math

import pytest
import torch
from torch import Tensor

from gapo_mega import aggregation
from gapo_mega.aggregation import NonFiniteGramError, ZeroGradientError
from gapo_mega.aggregation.apart import Apart
from gapo_mega.ops import Status
from tests.helpers.aggregators import OnHost, Recorded

METHODS = [("gapo", {"p": 1.0}), ("gapo", {"p": 2.0}), ("mgda", {}), ("p_gapo", {}), ("weighted_sum", {})]


def gram_of(objectives: int, seed: int = 0) -> Tensor:
    """Of opposed rows, and a KL row with a share of all of them."""
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(objectives + 1, 20, dtype=torch.float64, generator=generator)
    rows[-1] += rows[:-1].sum(dim=0)
    return rows @ rows.t()


@pytest.mark.parametrize("beta", [0.0, 0.05, 3.0])
@pytest.mark.parametrize("objectives", [1, 2, 4])
@pytest.mark.parametrize(("name", "options"), METHODS)
def test_the_kl_gets_beta_times_the_sum(
    name: str, options: dict[str, float], objectives: int, beta: float
) -> None:
    method = aggregation.build(name, **options)
    gram = gram_of(objectives)
    found = Apart(method, lambda: beta).weigh(gram)
    expected = method(gram[:-1, :-1])
    assert found.ok()
    torch.testing.assert_close(found.weights[:-1], expected, rtol=1e-12, atol=0)
    assert float(found.weights[-1]) == pytest.approx(beta * float(expected.sum()), rel=1e-12)
    assert torch.equal(found.gram, gram)


def test_the_direction_is_that_of_gradients_that_each_hold_the_kl() -> None:
    """``sum w_i (g_i + beta g_kl)``, with weights from the ``g_i`` alone."""
    rows = torch.randn(4, 30, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    method = aggregation.build("gapo", p=1.0)
    weights = Apart(method, lambda: 0.3).weigh(rows @ rows.t()).weights
    alone = method(rows[:-1] @ rows[:-1].t())
    torch.testing.assert_close(weights @ rows, alone @ (rows[:-1] + 0.3 * rows[-1]), rtol=1e-10, atol=1e-12)


def test_beta_is_asked_every_time() -> None:
    betas = iter([0.1, 0.2])
    method = Apart(aggregation.build("weighted_sum"), lambda: next(betas))
    first, second = (float(method.weigh(gram_of(2)).weights[-1]) for _ in range(2))
    assert second == pytest.approx(2 * first)


def test_a_method_with_memory_remembers_its_own_rows_of_what_was_committed() -> None:
    memory = OnHost()
    recorded = Recorded(memory)
    method = Apart(recorded, lambda: 0.1)
    gram = gram_of(2)
    method.weigh(gram_of(2, seed=1))  # asking changes nothing
    method.commit(method.weigh(gram))
    (told,) = recorded.committed
    assert torch.equal(told.gram, gram[:-1, :-1])
    assert torch.equal(told.weights, recorded.answers[-1].weights)
    assert memory.before is not None and torch.equal(memory.before, gram.diagonal()[:-1])


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("row", [0, 2])
def test_a_gradient_that_is_not_finite(row: int, bad: float) -> None:
    gram = gram_of(2)
    gram[row] = gram[:, row] = bad
    method = Apart(aggregation.build("gapo"), lambda: 0.1)
    found = method.weigh(gram)
    assert int(found.status) == Status.NOT_FINITE and not found.weights.any()
    error = method.error(found)
    assert isinstance(error, NonFiniteGramError) and error.objectives == [row]


def test_a_zero_gradient_is_told_as_the_method_tells_it() -> None:
    gram = gram_of(2)
    gram[1] = gram[:, 1] = 0.0
    method = Apart(aggregation.build("gapo", zero_gradient="stop"), lambda: 0.1)
    error = method.error(method.weigh(gram))
    assert isinstance(error, ZeroGradientError) and error.objectives == [1]
    # The KL's own gradient is zero at the reference, which is no fault.
    gram = gram_of(2)
    gram[2] = gram[:, 2] = 0.0
    assert method.weigh(gram).ok()


def test_who_is_out_of_range() -> None:
    gram = gram_of(2)
    huge = Apart(aggregation.build("weighted_sum"), lambda: 1e60)
    with pytest.raises(ValueError, match=r"^algorithm\.kl_beta: found 1e\+60, with which the KL row"):
        raise huge.error(huge.weigh(gram))
    method = Apart(aggregation.build("weighted_sum", weights=[1e50, 1e50]), lambda: 0.1)
    with pytest.raises(ValueError, match=r"^scale: found 'none'"):
        raise method.error(method.weigh(gram))
