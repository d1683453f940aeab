"""GRPO's advantages (Shao et al. 2024, arXiv 2402.03300): against the mean and the spread of the prompt."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.group import BECAUSE, check_normalization, group_advantages
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class Grpo(AdvantageEstimator):
    """``A_i = (r_i - mean r) / (std r + epsilon)`` for every token, over the n samples of a prompt.

    It is ``group`` with ``baseline: mean``, which says where the KL reward goes. ``std`` has n - 1 in the
    denominator and ``epsilon`` is 1e-4, as in TRL; verl has 1e-6. ``normalize: false`` leaves out the
    division: that is Dr. GRPO (arXiv 2503.20783) and, with ``advantages.whiten``, REINFORCE++ with a baseline
    (arXiv 2501.03262, REINFORCE++-baseline).
    """

    name: ClassVar[str] = "grpo"
    least_samples: ClassVar[int] = 2
    least_samples_because: ClassVar[str] = BECAUSE

    normalize: bool = True
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        check_normalization(self.normalize, self.epsilon)

    def __call__(self, experience: Experience) -> Experience:
        return group_advantages(experience, "mean", self.epsilon if self.normalize else None)
