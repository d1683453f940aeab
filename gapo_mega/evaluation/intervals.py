"""Confidence intervals of means over prompts, by bootstrap: prompts are drawn, with all their samples."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.stats import bootstrap

Array = NDArray[np.float64]

_AT_ONCE = 200_000  # drawn prompts that are held at a time, for each mean


@dataclass(frozen=True)
class Resampling:
    """How intervals are made."""

    confidence: float = 0.95
    resamples: int = 9999
    seed: int = 1


@dataclass(frozen=True)
class Estimate:
    """A mean over prompts and its interval; None for both ends where one prompt tells none."""

    mean: float
    low: float | None
    high: float | None


def estimates(values_KP: Array, how: Resampling) -> list[Estimate]:
    """The means of K rows over the same P prompts, each with its BCa interval (Efron 1987).

    All rows see the same draws, and a row's interval does not depend on the others. A row of equal numbers
    has an interval of length 0, which says nothing about other prompts.
    """
    means_K = values_KP.mean(axis=1)
    if values_KP.shape[1] < 2:
        return [Estimate(float(mean), None, None) for mean in means_K]
    low_K, high_K = means_K.copy(), means_K.copy()
    varying_K = np.ptp(values_KP, axis=1) > 0
    if varying_K.any():
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
        low_K[varying_K], high_K[varying_K] = found.low, found.high
    rows = zip(means_K, low_K, high_K, strict=True)
    return [Estimate(float(mean), float(low), float(high)) for mean, low, high in rows]
