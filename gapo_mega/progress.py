"""How far every objective has come since a run's start, in units that do not depend on its scale."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_KEYS = {"baseline", "unit", "value"}


class Progress:
    """A running mean of calibrated rewards: ``(mean - baseline) / unit`` per objective.

    ``baseline`` is the mean score that a run starts from, ``unit`` the spread over samples there. ``begin``
    fixes both from many samples of the policy before training. Without it the first rollout step does, which
    is a rough start: its mean errs by up to ``unit / sqrt(prompts)``, which stays in the progress for good.
    An objective whose samples are all alike at the start has no unit yet, and so its progress is 0: the unit
    is then the spread of the first step whose samples differ.

    Every data rank tells the same numbers, and so has the same progress. Raises ``ValueError`` for another
    number of objectives than before.
    """

    def __init__(self, decay: float = 0.9) -> None:
        """``decay``, >= 0 and < 1: the share of the value before in the running mean."""
        assert 0 <= decay < 1, decay
        self._decay = decay
        self._baseline: Tensor | None = None  # all three [M] float64, on the CPU
        self._unit: Tensor | None = None  # 0 where there is none yet
        self._value: Tensor | None = None

    @property
    def value(self) -> Tensor | None:
        """Progress [M], float64 on the CPU, 0 at the start; None before ``begin`` or ``observe``."""
        return None if self._value is None else self._value.clone()

    def begin(self, means_M: Tensor, spreads_M: Tensor) -> None:
        """Fix the start: means and standard deviations of the scores before training. Once; then no more.

        Accepts what ``observe`` accepts.
        """
        if self._value is None:
            means_M, spreads_M = _checked(means_M, spreads_M)
            self._baseline, self._unit = means_M.clone(), spreads_M.clone()
            self._value = torch.zeros_like(means_M)

    def observe(self, means_M: Tensor, spreads_M: Tensor) -> None:
        """Take in one rollout step: scores' means and standard deviations over all its samples.

        Both are finite, and spreads are >= 0: exactly 0 where all samples are alike.
        """
        if self._baseline is None or self._unit is None or self._value is None:
            return self.begin(means_M, spreads_M)
        means_M, spreads_M = _checked(means_M, spreads_M)
        if len(means_M) != len(self._baseline):
            raise ValueError(
                f"progress: found {len(means_M)} objectives, accepted: the {len(self._baseline)} of the start"
            )
        self._unit = torch.where(self._unit > 0, self._unit, spreads_M)
        known = self._unit > 0
        moved = (means_M - self._baseline) / torch.where(known, self._unit, 1.0)
        calibrated = torch.where(known, moved, 0.0)
        self._value = self._decay * self._value + (1 - self._decay) * calibrated

    def steered(self, preference_M: Tensor, mu: float) -> Tensor:
        """Smooth Tchebycheff weights ``v_i / unit_i``, ``v_i`` proportional to ``u_i exp(-progress_i / mu)``.

        The v have sum 1. Float64 [M] on the device of the preference, which is >= 0; an objective without a
        unit has 1. Before the start is fixed progress is 0 and the units are 1.

        Raises ``ValueError`` for another number of objectives than the progress has.
        """
        u = preference_M.to(torch.float64)
        if self._value is None or self._unit is None:
            return u / u.sum()
        if len(u) != len(self._value):
            raise ValueError(
                f"progress: found {len(self._value)} objectives, accepted: the {len(u)} that are weighted"
            )
        unit = torch.where(self._unit > 0, self._unit, 1.0).to(u.device)
        return (u.log() - self._value.to(u.device) / mu).softmax(dim=0) / unit

    def state_dict(self) -> dict[str, Any]:
        """``baseline``, ``unit`` and ``value`` as lists of M numbers; empty before the start."""
        if self._baseline is None or self._unit is None or self._value is None:
            return {}
        return {
            "baseline": self._baseline.tolist(),
            "unit": self._unit.tolist(),
            "value": self._value.tolist(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for other keys."""
        if set(state) not in (_KEYS, set()):
            raise ValueError(f"progress: found state {sorted(state)}, accepted: {', '.join(sorted(_KEYS))}")
        read = {key: torch.tensor(numbers, dtype=torch.float64) for key, numbers in state.items()}
        self._baseline, self._unit, self._value = (read.get(key) for key in ("baseline", "unit", "value"))


def _checked(means_M: Tensor, spreads_M: Tensor) -> tuple[Tensor, Tensor]:
    means_M, spreads_M = (numbers.detach().to("cpu", torch.float64) for numbers in (means_M, spreads_M))
    assert means_M.ndim == 1 and means_M.shape == spreads_M.shape, (means_M.shape, spreads_M.shape)
    assert bool(means_M.isfinite().all() & spreads_M.isfinite().all() & (spreads_M >= 0).all())
    return means_M, spreads_M
