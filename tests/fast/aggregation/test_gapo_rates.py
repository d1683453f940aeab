"""Rates of GAPO: who improves how fast, and how adaptive rates follow progress."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from gapo_mega.aggregation import build, diagnose
from gapo_mega.aggregation.rates import adaptive_rates


def jacobian(m: int, seed: int) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    rows = torch.randn(m, 4 * m, generator=generator, dtype=torch.float64)
    return rows * 10 ** (3 * torch.rand(m, 1, generator=generator, dtype=torch.float64))


def numbers(*values: float) -> Tensor:
    return torch.tensor(values, dtype=torch.float64)


@pytest.mark.parametrize("p", [0.0, 0.5, 1.0, 2.0])
@pytest.mark.parametrize("m", [2, 3, 5])
def test_improvements_are_in_the_ratio_of_the_rates_times_the_norms_to_the_p(m: int, p: float) -> None:
    """Theorem 3.3 with rates, wherever all weights are positive; else those with weight 0 gain more."""
    interior = 0
    for seed in range(10):
        rows = jacobian(m, seed)
        gram = rows @ rows.T
        rates = torch.rand(m, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) + 0.5
        weights = build("gapo", p=p, rates=rates.tolist(), scale="mean_norm")(gram)
        relative = (gram @ weights) / (rates * gram.diagonal().sqrt() ** p)
        inside = weights > 0
        least = relative[inside].mean()
        # Solves of systems whose condition is below 1e7 for the rescaled gradients.
        torch.testing.assert_close(relative[inside], least.expand(int(inside.sum())), rtol=1e-8, atol=0)
        assert bool((relative >= least * (1 - 1e-8)).all())
        assert diagnose(gram, weights).hurt == []
        interior += bool(inside.all())
    assert interior >= 2


@pytest.mark.parametrize("p", [1.0, 2.0])
def test_equal_rates_are_the_papers_method_whatever_their_size(p: float) -> None:
    gram = jacobian(3, 0) @ jacobian(3, 0).T
    expected = build("gapo", p=p)(gram)
    for options in ({"rates": [7.0] * 3}, {"rates": "preference", "preference": [1 / 3] * 3}):
        # One more sum and a logarithm.
        torch.testing.assert_close(build("gapo", p=p, **options)(gram), expected, rtol=1e-12, atol=0)
    assert torch.equal(build("gapo", p=p, rates="adaptive")(gram), expected)  # nothing observed yet


def test_a_preference_gives_the_rates_and_is_renormalised_over_what_is_left() -> None:
    rows = jacobian(4, 1)
    rows[2] = 0.0
    gram = rows @ rows.T
    left = torch.tensor([0, 1, 3])
    found = build("gapo", rates="preference", preference=[0.1, 0.2, 0.3, 0.4])(gram)
    expected = build("gapo", rates=[1.0, 2.0, 4.0])(gram[left][:, left])
    torch.testing.assert_close(found[left], expected, rtol=1e-12, atol=0)
    assert float(found[2]) == 0.0


def rates_by_testbed(preference: Sequence[float], progress: Sequence[float], eta: float) -> list[float]:
    """As the study has it, in numpy."""
    s = np.array(preference) * len(preference)
    lag = np.array(progress) / s
    s = s * np.exp(-eta * (lag - lag.mean()))
    return list(np.clip(s / s.mean(), 0.02, 50))


@pytest.mark.parametrize("eta", [0.1, 1.0, 30.0])
def test_adaptive_rates_are_those_of_the_study(eta: float) -> None:
    preference, progress = [0.5, 0.3, 0.2], [0.4, -0.1, 0.05]
    found = adaptive_rates(preference, numbers(*progress), eta)
    assert found.tolist() == pytest.approx(rates_by_testbed(preference, progress, eta), rel=1e-12)
    equal = adaptive_rates(None, numbers(*progress), eta)
    assert equal.tolist() == pytest.approx(rates_by_testbed([1 / 3] * 3, progress, eta), rel=1e-12)


def test_adaptive_rates_are_cut_and_never_overflow() -> None:
    found = adaptive_rates(None, numbers(1e6, 0.0, -1e6), 5.0)
    assert found.tolist() == [0.02, 0.02, pytest.approx(3.0)]


def observed(**options: Any) -> Any:
    method = build("gapo", rates="adaptive", **options)
    for means in ((1.0, 10.0, -3.0), (2.0, 10.0, -3.0), (3.0, 9.0, -3.5)):
        method.observe(numbers(*means), numbers(2.0, 5.0, 1.0))
    return method


def test_who_is_behind_gets_the_higher_rate() -> None:
    """By hand: progress (0, .5, 1), (0, 0, -.2), (0, 0, -.5) with decay 0.9."""
    progress = [0.9 * 0.05 + 0.1, 0.1 * -0.2, 0.1 * -0.5]
    gram = jacobian(3, 2) @ jacobian(3, 2).T
    expected = build("gapo", rates=rates_by_testbed([0.2, 0.3, 0.5], progress, 2.0))(gram)
    found = observed(eta=2.0, preference=[0.2, 0.3, 0.5])(gram)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=0)


def test_progress_goes_through_a_checkpoint_and_belongs_to_adaptive_rates() -> None:
    gram = jacobian(3, 3) @ jacobian(3, 3).T
    straight = observed()
    resumed = build("gapo", rates="adaptive")
    resumed.load_state_dict(json.loads(json.dumps(straight.state_dict())))
    for method in (straight, resumed):
        method.observe(numbers(2.0, 8.0, -2.0), numbers(1.0, 1.0, 1.0))
    assert torch.equal(straight(gram), resumed(gram))
    assert not torch.equal(straight(gram), build("gapo")(gram))
    plain = build("gapo")
    plain.observe(numbers(1.0), numbers(1.0))
    assert plain.state_dict() == {}
    with pytest.raises(ValueError, match=r"aggregation gapo: found state \['progress'\], accepted: none"):
        plain.load_state_dict(straight.state_dict())


def test_progress_of_another_number_of_objectives_is_refused() -> None:
    with pytest.raises(ValueError, match="rates: found the progress of 3 objectives, accepted: of the 2 "):
        observed()(torch.eye(2, dtype=torch.float64))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rates": "fair"}, "rates: found 'fair', accepted: preference, adaptive, or a list"),
        ({"rates": [1.0, 0.0]}, r"rates: found \[1.0, 0.0\]"),
        ({"rates": []}, r"rates: found \[\]"),
        ({"rates": 2.0}, "rates: found 2.0"),
        ({"rates": [1.0, math.inf]}, "rates: found"),
        ({"rates": "preference"}, "preference: found None with rates 'preference'"),
        ({"preference": [0.5, 0.5]}, r"preference: found \[0.5, 0.5\] with rates None"),
        ({"rates": [1, 2], "preference": [0.5, 0.5]}, r"preference: found \[0.5, 0.5\] with rates \[1, 2\]"),
        ({"rates": "adaptive", "preference": [1.0, 0.0]}, "preference: found"),
        ({"rates": "adaptive", "eta": 0}, "eta: found 0, accepted: a finite number > 0"),
        ({"rates": [1, 2], "eq17_literal": True}, "rates: found .* with eq17_literal"),
    ],
)
def test_options_are_checked(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        build("gapo", **options)
