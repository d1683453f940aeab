"""Intervals of means, against Student's t and against themselves."""

from __future__ import annotations

from dataclasses import astuple

import numpy as np
import pytest
from scipy.stats import t

from gapo_mega.evaluation.intervals import Estimate, Resampling, estimates


def test_for_many_prompts_it_is_student_s_interval() -> None:
    values_KP = np.random.default_rng(0).normal(size=(2, 400)) * np.array([[1.0], [50.0]])
    for values_P, found in zip(values_KP, estimates(values_KP, Resampling()), strict=True):
        error = values_P.std(ddof=1) / 20
        low, high = t.interval(0.95, 399, values_P.mean(), error)
        assert found.mean == pytest.approx(values_P.mean(), rel=1e-12)
        # An end is off by the resampling's own error (about 2% of the half-width) and by the skew.
        assert found.low == pytest.approx(low, abs=0.2 * error)
        assert found.high == pytest.approx(high, abs=0.2 * error)


def test_it_holds_the_mean_as_often_as_it_says() -> None:
    """Of 20 skewed prompts: BCa is known to cover a little less than it promises."""
    draws_KP = np.random.default_rng(1).exponential(size=(300, 20))
    found = estimates(draws_KP, Resampling(resamples=999))
    ends = [(each.low or 0.0, each.high or 0.0) for each in found]
    held = np.mean([low < 1 < high for low, high in ends])
    assert 0.86 < held < 0.98


def test_rows_do_not_depend_on_each_other() -> None:
    values_KP = np.random.default_rng(2).normal(size=(3, 30))
    values_KP[1] = 4.0
    how = Resampling(resamples=500, seed=7)
    together = estimates(values_KP, how)
    assert together[1] == Estimate(4.0, None, None)
    for k in (0, 2):
        (alone,) = estimates(values_KP[k : k + 1], how)
        # The order of a sum depends on how many rows there are.
        assert astuple(alone) == pytest.approx(astuple(together[k]), rel=1e-12)
    assert estimates(values_KP[:1], Resampling(resamples=500, seed=8)) != together[:1]


def test_one_prompt_has_no_interval() -> None:
    assert estimates(np.array([[3.0]]), Resampling()) == [Estimate(3.0, None, None)]
