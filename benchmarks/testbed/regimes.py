"""The kinds of conflict that methods are tried in: how rewards correlate, what they look like, noise."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# dense: normal. rare: 2 % of responses earn it. heavy: log-normal, cut. saturating: 93 % are at the ceiling.
Kind = Literal["dense", "rare", "heavy", "saturating"]


@dataclass(frozen=True)
class Regime:
    """One kind of problem with M objectives; a seed makes an instance of it."""

    label: str
    kinds: tuple[Kind, ...]
    scales: tuple[float, ...]  # of the scores that a method sees, in units of their spread
    correlation: float = 0.0  # of every pair of latent rewards
    against: tuple[float, float] | None = None  # all but the last agree, all disagree with the last
    noise: tuple[float, ...] | None = None  # of a score beside its spread 1; None: by kind

    @property
    def count(self) -> int:
        """M."""
        return len(self.kinds)

    @property
    def noises(self) -> NDArray[np.float64]:
        """Deviations of the observation noise [M]; verifiable rewards (rare, saturating) have none."""
        if self.noise is not None:
            return np.array(self.noise)
        return np.array([1.0 if kind in ("dense", "heavy") else 0.0 for kind in self.kinds])

    def correlations(self) -> NDArray[np.float64]:
        """Of the latent rewards [M, M]."""
        found = np.full((self.count, self.count), self.correlation)
        if self.against is not None:
            found[:], found[-1], found[:, -1] = self.against[0], self.against[1], self.against[1]
        np.fill_diagonal(found, 1.0)
        return found


_DENSE: tuple[Kind, ...] = ("dense", "dense", "dense")

REGIMES: dict[str, Regime] = {
    "benign": Regime("benign", _DENSE, (1, 1, 1)),
    "scales": Regime("scales 1:10:1000", _DENSE, (1, 10, 1000)),
    "kinds3": Regime("different kinds, m = 3", ("dense", "rare", "heavy"), (1000, 1, 10), -0.2),
    "kinds2": Regime("different kinds, m = 2", ("dense", "rare"), (1000, 1), -0.4),
    "kinds5": Regime(
        "different kinds, m = 5",
        ("dense", "dense", "rare", "heavy", "saturating"),
        (1, 1000, 10, 100, 1),
        -0.15,
    ),
    "saturating": Regime("saturating", ("dense", "dense", "saturating"), (1, 1, 1), -0.3),
    "noisy": Regime("one noisy", _DENSE, (1, 1, 1), -0.2, noise=(1, 1, 5)),
    "majority": Regime("majority against one", _DENSE, (1, 1, 1), against=(0.8, -0.7)),
}
