"""RLOO (Ahmadian et al. 2024, arXiv 2402.14740): each sample against the others of its prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.group import BECAUSE, group_advantages
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class Rloo(AdvantageEstimator):
    """``A_i = R_i - 1 / (n - 1) sum_{j != i} R_j`` for every token, R = score + KL reward of the response.

    It is ``group`` as it comes.
    """

    name: ClassVar[str] = "rloo"
    least_samples: ClassVar[int] = 2
    least_samples_because: ClassVar[str] = BECAUSE

    def __call__(self, experience: Experience) -> Experience:
        return group_advantages(experience, "leave_one_out", epsilon=None)
