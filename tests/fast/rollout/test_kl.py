"""The coefficient of the KL: fixed, or steered as Ziegler et al. (2019) do it."""

from __future__ import annotations

import math

import pytest

from gapo_mega.rollout.kl import KlCoefficient


def test_without_a_target_it_stays() -> None:
    coefficient = KlCoefficient(0.05)
    coefficient.observe(100.0, 1000)
    assert coefficient.value == 0.05 and not coefficient.adapts
    assert coefficient.state_dict() == {}


@pytest.mark.parametrize(
    ("kl", "factor"),
    # The error counts up to a fifth; a rollout of 1000 responses is a tenth of the horizon.
    [(6.0, 1.0), (6.6, 1.01), (60.0, 1.02), (5.7, 0.995), (0.0, 0.98), (-3.0, 0.98), (math.inf, 1.02)],
)
def test_one_rollout(kl: float, factor: float) -> None:
    coefficient = KlCoefficient(0.1, target=6.0, horizon=10_000)
    coefficient.observe(kl, 1000)
    assert coefficient.value == pytest.approx(0.1 * factor, rel=1e-12)


def test_a_kl_that_is_no_number_changes_nothing() -> None:
    coefficient = KlCoefficient(0.1, target=6.0)
    coefficient.observe(math.nan, 1000)
    assert coefficient.value == 0.1


def test_a_rollout_beyond_the_horizon_counts_as_one_horizon() -> None:
    """Else the coefficient would turn negative."""
    coefficient = KlCoefficient(0.1, target=6.0, horizon=10)
    coefficient.observe(0.0, 1000)
    assert coefficient.value == pytest.approx(0.08)


def test_it_holds_a_plant_at_the_target() -> None:
    """A KL that falls as 1 / beta settles where it is the target."""
    coefficient = KlCoefficient(0.1, target=2.0, horizon=500)
    for _ in range(200):
        coefficient.observe(1.0 / coefficient.value, 100)
    assert 1.0 / coefficient.value == pytest.approx(2.0, rel=1e-2)


def test_the_state_goes_on() -> None:
    first = KlCoefficient(0.1, target=6.0)
    first.observe(60.0, 500)
    second = KlCoefficient(0.1, target=6.0)
    second.load_state_dict(first.state_dict())
    assert second.value == first.value != 0.1
    # A checkpoint from before there was a target says nothing of it.
    second.load_state_dict({})
    assert second.value == first.value
