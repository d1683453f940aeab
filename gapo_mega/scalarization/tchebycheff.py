"""Smooth Tchebycheff weights, steered by the objectives' progress (after Lin et al., arXiv 2402.19078)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.option_checks import require_number, require_preference
from gapo_mega.progress import Progress
from gapo_mega.scalarization.base import Weighted
from gapo_mega.scalarization.options import preference_of


@dataclass(kw_only=True)
class Tchebycheff(Weighted):
    """``r = sum_k w_k r_k / unit_k``, ``w_k`` proportional to ``u_k exp(-progress_k / mu)``, with sum 1.

    ``unit_k`` is the score's spread over samples before training, ``progress_k`` the running mean of how far
    the mean score has come since then, in that unit (``gapo_mega/progress.py``); this batch is included.
    What lags gets the weight. ``mu``: > 0; small: the objective that lags most alone, large: u.
    ``preference``: u, one number > 0 per objective with sum 1; if left out 1/M.

    ``kl_beta`` is set against rewards of spread 1 here. With a critic every objective's advantage has
    the KL reward's part, so it counts ``sum_k w_k / unit_k`` times.
    """

    name: ClassVar[str] = "tchebycheff"

    preference: Sequence[float] | None = None
    mu: float = 0.1
    _progress: Progress = field(default_factory=Progress, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preference("preference", self.preference, zeros=False)
        require_number("mu", self.mu, 0, above=True)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.preference is None else {"preference": self.preference}

    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        preference = preference_of(self.preference, len(scores_MB))
        return self._after(scores_MB).steered(preference, float(self.mu))

    def facts(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> dict[str, float]:
        """Also every objective's progress, as ``progress/NAME``."""
        value = self._after(scores_MB).value
        assert value is not None
        named = {f"progress/{name}": x for name, x in zip(self._names, value.tolist(), strict=True)}
        return super().facts(scores_MB, group_B, lengths_B) | named

    def begin(self, means_M: Tensor, spreads_M: Tensor) -> None:
        self._progress.begin(means_M, spreads_M)

    def commit(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> None:
        self._progress = self._after(scores_MB)

    def state_dict(self) -> dict[str, Any]:
        return {"progress": self._progress.state_dict()}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._progress.load_state_dict(state["progress"])

    def _after(self, scores_MB: Tensor) -> Progress:
        """The progress with this batch in it."""
        found = Progress()
        found.load_state_dict(self._progress.state_dict())
        scores_MB = scores_MB.double()
        alike_M = (scores_MB == scores_MB[:, :1]).all(dim=1)
        found.observe(scores_MB.mean(dim=1), torch.where(alike_M, 0.0, scores_MB.std(dim=1, correction=0)))
        return found
