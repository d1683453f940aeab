"""Confidence intervals of means over prompts, by bootstrap: prompts are drawn, with all their samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import bootstrap

from gapo_mega.evaluation.series import Array

_AT_ONCE = 200_000  # drawn prompts that are held at a time, for each mean


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    confidence: float = 0.95
    resamples: int = 9999
    seed: int = 1


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its interval; None for both ends where all prompts are alike."""

    mean: float
    low: float | None
    high: float | None


def estimates(values_KP: Array, how: Resampling) -> list[Estimate]:
    """The means of K rows over the same P prompts, each with its BCa interval (Efron 1987).

    All rows see the same draws, and a row's interval does not depend on the others. A row of equal numbers
    has no interval: it has no spread to make one of.
    """
    means_K = values_KP.mean(axis=1)
    ends_K: list[tuple[float, float] | None] = [None] * len(values_KP)
    varying_K = np.flatnonzero(np.ptp(values_KP, axis=1) > 0)
    if len(varying_K):
        found: Any = bootstrap(
            (values_KP[varying_K],),
            np.mean,
            axis=-1,
            vectorized=True,
            n_resamples=how.resamples,
            confidence_level=how.confidence,
            method="BCa",
            batch=max(1, _AT_ONCE // values_KP.shape[1]),
            rng=np.random.default_rng(how.seed),
        ).confidence_interval
        for row, low, high in zip(varying_K, found.low, found.high, strict=True):
            ends_K[row] = float(low), float(high)
    return [
        Estimate(float(mean), *(ends or (None, None))) for mean, ends in zip(means_K, ends_K, strict=True)
    ]
