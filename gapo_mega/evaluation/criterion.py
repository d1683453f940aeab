"""Which of several policies is the best in all objectives: one number of a held-out evaluation.

Gains are the paired changes since before training, in units of how much the scores spread over the held-out
answers before training: objectives with other scales then count alike, and the unit stays the same in all
evaluations of a run.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeAlias

import numpy as np

from gapo_mega.config.results import HYPERVOLUME, WORST_GAIN
from gapo_mega.evaluation.front import hypervolume
from gapo_mega.evaluation.series import Array
from gapo_mega.evaluation.summary import Summary

# Compared from the left; the first number is the one that is told.
Rank: TypeAlias = tuple[float, ...]


def spreads(before_MN: Sequence[Sequence[float]], of_constant: float = 1.0) -> Array:
    """Standard deviation of every objective's scores before training [M]; above 0 unless asked otherwise.

    Args:
        before_MN: scores of the N held-out answers.
        of_constant: what to give where all are alike.
    """
    scores_MN = np.asarray(before_MN, dtype=np.float64)
    spread_M: Array = scores_MN.std(axis=1)
    # Scores are float32: what spreads by no more than their rounding is constant.
    rounding_M = np.finfo(np.float32).eps * np.abs(scores_MN).max(axis=1)
    return np.where(spread_M > rounding_M, spread_M, of_constant)


def rank_of(by: str, summary: Summary, spread_M: Array) -> Rank:
    """What an evaluation is compared by; higher is better.

    Args:
        by: an objective: its mean held-out score. ``worst_gain``: the smallest gain of all. ``hypervolume``:
            the volume between the means before training and now, the product of the gains where all are
            positive. Where one is not, the volume is 0, and the smallest gain decides among those.
        summary: of all objectives, before training and now.
        spread_M: the unit of the gains, in the summary's order.
    """
    if by in summary:
        return (summary[by].after,)
    gains_M = np.array([change.difference for change in summary.values()]) / spread_M
    worst = float(gains_M.min())
    if by == WORST_GAIN:
        return (worst,)
    assert by == HYPERVOLUME, by
    return (hypervolume(gains_M[None, :], [0.0] * len(gains_M)), worst)
