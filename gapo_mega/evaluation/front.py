"""Points with several objectives, judged together: who is dominated, and how good each method's points are.

Higher is better in every objective. Dominance, hypervolume, epsilon and IGD+ are moocore's. Nothing here
knows the true front: epsilon and IGD+ are against the union front, the best of the points at hand.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import moocore
import numpy as np
from numpy.typing import NDArray
from scipy.spatial.distance import cdist

from gapo_mega.evaluation.series import Array
from gapo_mega.evaluation.summary import CONFIDENCE

DRAWS = 2000
_SEED = 1


@dataclass(frozen=True)
class Candidate:
    """One setting of a method, with a point for every seed."""

    name: str
    method: str
    by_seed: dict[int, tuple[float, ...]]  # a number per objective
    errors: tuple[float, ...] | None = None  # standard errors within a run, for a single seed; NaN: unknown

    @property
    def mean(self) -> Array:
        """Over the seeds [M]."""
        mean: Array = np.mean(list(self.by_seed.values()), axis=0, dtype=np.float64)
        return mean


def judge(
    candidates: Sequence[Candidate], names: Sequence[str], reference: Sequence[float] | None
) -> dict[str, Any]:
    """The front of the candidates' means over seeds, and every method's measures, as JSON.

    ``nondominated`` is the share of bootstrap draws in which a candidate's mean is dominated by no other:
    over seeds, all candidates with the same draw of seeds; with one seed over the held-out standard errors,
    taken as normal and independent. Few seeds make few different draws, and too narrow intervals.

    ``hypervolume`` is the volume between the means and ``reference``; points that are not better than it in
    every objective add nothing. ``epsilon``: how far a method's points must all be raised to cover the union
    front, ``igd_plus``: the mean distance that is missing from the union front to the method's points, both
    with every objective scaled to the union front's range. ``spacing`` is that of the union front, scaled
    alike. ``coverage``: the share of another method's non-dominated points that one of this method's equals
    or beats in every objective.

    Args:
        candidates: at least one.
        names: of the objectives.
        reference: where hypervolume begins, [M]; None where it is not known, and neither is hypervolume.
    """
    means_KM = np.array([candidate.mean for candidate in candidates], dtype=float)
    drawn_DKM, source = _draws(candidates, means_KM)
    on_front_K = nondominated(means_KM)
    union = np.unique(means_KM[on_front_K], axis=0)
    methods = list(dict.fromkeys(candidate.method for candidate in candidates))
    rows = {method: [i for i, c in enumerate(candidates) if c.method == method] for method in methods}
    measure = _volume(reference)
    share_K = np.mean([nondominated(draw_KM) for draw_KM in drawn_DKM], axis=0) if source else None
    return {
        "objectives": list(names),
        "hypervolume": measure(means_KM),
        "hypervolume_interval": _interval([measure(draw) for draw in drawn_DKM]),
        "confidence_from": source,
        "candidates": [
            {
                "name": candidate.name,
                "method": candidate.method,
                "seeds": sorted(candidate.by_seed),
                "mean": dict(zip(names, map(float, candidate.mean), strict=True)),
                "on_front": bool(on_front_K[index]),
                "nondominated": None if share_K is None else float(share_K[index]),
            }
            for index, candidate in enumerate(candidates)
        ],
        "spacing": spacing(_scaled(union, union)[1]),
        "union_front": [candidate.name for candidate, on in zip(candidates, on_front_K, strict=True) if on],
        "methods": {
            method: {
                "points": len(rows[method]),
                "on_union_front": int(on_front_K[rows[method]].sum()),
                "hypervolume": measure(means_KM[rows[method]]),
                "hypervolume_interval": _interval([measure(draw[rows[method]]) for draw in drawn_DKM]),
                "hypervolume_by_seed": _by_seed([candidates[i] for i in rows[method]], measure),
                "epsilon": float(moocore.epsilon_additive(*_scaled(means_KM[rows[method]], union))),
                "igd_plus": float(moocore.igd_plus(*_scaled(means_KM[rows[method]], union))),
                "coverage": {
                    other: coverage(means_KM[rows[method]], means_KM[rows[other]])
                    for other in methods
                    if other != method
                },
            }
            for method in methods
        },
    }


def nondominated(points_KM: Array) -> NDArray[np.bool_]:
    """Which points no other one beats: as good everywhere, better somewhere. Equal points all count [K]."""
    found: NDArray[np.bool_] = moocore.is_nondominated(points_KM, maximise=True, keep_weakly=True)
    return found


def hypervolume(points_KM: Array, reference_M: Sequence[float]) -> float:
    """The volume of all that lies between ``reference_M`` and a point."""
    return float(moocore.hypervolume(points_KM, ref=np.asarray(reference_M, dtype=float), maximise=True))


def coverage(points_KM: Array, others_KM: Array) -> float:
    """The share of the non-dominated ``others_KM`` that a point equals or beats in every objective."""
    front = others_KM[nondominated(others_KM)]
    # By how much the points must be raised to cover one other point: not at all.
    raised = [moocore.epsilon_additive(points_KM, ref=other[None, :], maximise=True) for other in front]
    return float(np.mean(np.array(raised) <= 0))


def spacing(points_KM: Array) -> float | None:
    """How unevenly points are spread: std (ddof 1) of each one's L1 distance to its nearest neighbour.

    Schott 1995; 0: all neighbours are equally far. None for fewer than two points.
    """
    if len(points_KM) < 2:
        return None
    distances_KK = cdist(points_KM, points_KM, "cityblock")
    np.fill_diagonal(distances_KK, np.inf)
    return float(np.std(distances_KK.min(axis=1), ddof=1))


def _scaled(points_KM: Array, union_FM: Array) -> tuple[Array, Array]:
    """Points and union front, as moocore minimises: negative, in units of the union front's ranges."""
    low, high = union_FM.min(axis=0), union_FM.max(axis=0)
    unit = np.where(high > low, high - low, 1.0)
    return -(points_KM - low) / unit, -(union_FM - low) / unit


def _volume(reference: Sequence[float] | None) -> Callable[[Array], float | None]:
    return lambda points_KM: None if reference is None else hypervolume(points_KM, reference)


def _by_seed(candidates: Sequence[Candidate], measure: Callable[[Array], float | None]) -> dict[str, Any]:
    """The hypervolume of every seed that all candidates of a method have."""
    seeds = sorted(set.intersection(*(set(candidate.by_seed) for candidate in candidates)))
    return {str(seed): measure(np.array([c.by_seed[seed] for c in candidates])) for seed in seeds}


def _draws(candidates: Sequence[Candidate], means_KM: Array) -> tuple[Array, str | None]:
    """Means as other seeds, or other held-out prompts, might have had them [D, K, M], and which of both."""
    generator = np.random.default_rng(_SEED)
    seeds = sorted({seed for candidate in candidates for seed in candidate.by_seed})
    if len(seeds) > 1:
        values = np.full((len(candidates), len(seeds), means_KM.shape[1]), np.nan)
        for k, candidate in enumerate(candidates):
            for seed, point in candidate.by_seed.items():
                values[k, seeds.index(seed)] = point
        there_KS = np.isfinite(values).all(axis=2)
        times_DS = np.stack(
            [
                np.bincount(draw, minlength=len(seeds))
                for draw in generator.integers(len(seeds), size=(DRAWS, len(seeds)))
            ]
        )
        weights_DKS = times_DS[:, None, :] * there_KS[None]
        counts_DK = weights_DKS.sum(axis=2)
        sums = np.einsum("dks,ksm->dkm", weights_DKS.astype(float), np.nan_to_num(values))
        drawn = np.divide(sums, counts_DK[..., None], out=np.zeros_like(sums), where=counts_DK[..., None] > 0)
        # A draw without any seed that a candidate has says nothing about it.
        return np.where(counts_DK[..., None] > 0, drawn, means_KM[None]), "seeds"
    errors = [candidate.errors for candidate in candidates]
    if any(error is None or not np.isfinite(error).all() for error in errors):
        return np.empty((0, *means_KM.shape)), None
    errors_KM = np.array(errors, dtype=float)
    return means_KM + errors_KM * generator.standard_normal((DRAWS, *means_KM.shape)), "held-out prompts"


def _interval(values: Sequence[float | None]) -> list[float] | None:
    """The middle ``CONFIDENCE`` of draws; None without any."""
    numbers = [value for value in values if value is not None]
    if not numbers:
        return None
    tail = (1 - CONFIDENCE) / 2
    return [float(bound) for bound in np.quantile(numbers, [tail, 1 - tail])]
