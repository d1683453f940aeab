"""What methods are told of the scores before training."""

from __future__ import annotations

from dataclasses import replace

import numpy as np

from benchmarks.testbed.methods import METHODS
from benchmarks.testbed.problem import Problem
from benchmarks.testbed.regimes import REGIMES
from benchmarks.testbed.start import answers_before, starts


def test_many_answers_tell_the_true_start():
    """Rewards have mean 0 and spread 1 under pi_0; that of a heavy one is the hardest to estimate."""
    problem = Problem(REGIMES["kinds5"], (3, 4))
    scores_SAM = answers_before(problem, 20_000, seed=0)
    assert scores_SAM.shape == (2, 20_000, 5)
    expected_M = problem.scales_M * np.sqrt(1 + problem.regime.noises**2)
    np.testing.assert_allclose(scores_SAM.std(1), np.stack([expected_M] * 2), rtol=0.1)
    # Drawn for every context alike: at most the error of independent draws.
    assert (np.abs(scores_SAM.mean(1)) < 4 * expected_M / np.sqrt(20_000)).all()
    exact = starts(problem, METHODS["tchebycheff_known"], seed=0)
    assert exact is not None and len(exact) == 2
    np.testing.assert_allclose(exact[0]["unit"], expected_M)
    assert exact[0]["baseline"] == exact[0]["value"] == [0.0] * 5


def test_few_answers_tell_what_was_drawn_and_instances_differ():
    problem = Problem(REGIMES["noisy"], (3, 4))
    method = replace(METHODS["tchebycheff"], start_answers=60)
    told = starts(problem, method, seed=1)
    scores_SAM = answers_before(problem, 60, seed=1)
    assert told is not None
    assert [one["baseline"] for one in told] == scores_SAM.mean(1).tolist()
    assert [one["unit"] for one in told] == scores_SAM.std(1).tolist()
    assert told[0] != told[1] and told != starts(problem, method, seed=2)
    assert starts(problem, METHODS["tchebycheff"], seed=1) is None
