"""What evaluations are compared by, against closed forms and numpy."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest

from gapo_mega.evaluation.criterion import rank_of, spreads
from gapo_mega.evaluation.summary import Change, paired_summary


def summary(*gains: float) -> dict[str, Change]:
    return {f"o{i}": Change(1.0, 1.0 + gain, 0.1, 20) for i, gain in enumerate(gains)}


def test_spreads_are_standard_deviations_and_never_zero() -> None:
    scores = np.random.default_rng(0).normal(size=(2, 9)) * [[1.0], [50.0]]
    constant = np.full((1, 9), np.float32(0.1))
    found = spreads(np.concatenate([scores, constant]).tolist())
    np.testing.assert_allclose(found[:2], scores.std(axis=1), rtol=1e-12)
    assert found[2] == 1.0
    jitter = (1e6 + np.float32(0.03) * np.arange(9) % 2)[None].tolist()  # below float32's distance at 1e6
    assert spreads(jitter)[0] == 1.0


def test_an_objective_is_its_mean() -> None:
    assert rank_of("o1", summary(0.5, -0.25), np.ones(2)) == (0.75,)


def test_the_worst_gain_is_in_units_of_the_spread() -> None:
    """0.5 is half a spread of 1, 4 a tenth of one of 40."""
    assert rank_of("worst_gain", summary(0.5, 4.0), np.array([1.0, 40.0])) == pytest.approx((0.1,))


def test_hypervolume_is_the_product_of_positive_gains() -> None:
    assert rank_of("hypervolume", summary(0.5, 4.0, 3.0), np.array([1.0, 2.0, 1.0]))[0] == pytest.approx(3.0)


def test_without_a_volume_the_worst_gain_decides() -> None:
    spread = np.ones(2)
    ordered = [summary(9.0, -0.2), summary(0.1, -0.1), summary(5.0, 0.0), summary(0.01, 0.01), summary(1, 1)]
    ranks = [rank_of("hypervolume", found, spread) for found in ordered]
    assert ranks == sorted(ranks) and len(set(ranks)) == len(ranks)
    assert [rank[0] for rank in ranks[:3]] == [0.0] * 3


@pytest.mark.parametrize("by", ["o0", "worst_gain", "hypervolume"])
def test_one_objective_orders_alike_by_everything(by: str) -> None:
    values = [rank_of(by, summary(gain), np.array([2.0])) for gain in (-3.0, -1.0, 0.0, 0.5, 7.0)]
    assert values == sorted(values)


def test_a_real_evaluation() -> None:
    generator = np.random.default_rng(4)
    before: Any = generator.normal(size=(2, 30))
    after = before + [[0.3], [0.1]] + 0.01 * generator.normal(size=(2, 30))
    found = rank_of("worst_gain", paired_summary(before, after, ["a", "b"]), spreads(before.tolist()))
    expected = ((after - before).mean(axis=1) / before.std(axis=1)).min()
    assert math.isclose(found[0], expected, rel_tol=1e-9)
