"""What every advantage estimator shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from gapo_mega.types import Experience


class AdvantageEstimator(ABC):
    """Turns token rewards into advantages, per objective.

    Options are the fields of the (data)class that implements it.
    """

    name: ClassVar[str]
    # True: the estimator reads ``Experience.values_MBT``, so the run trains a critic.
    needs_values: ClassVar[bool] = False
    # True: it reads ``Experience.greedy_scores_MB``, so every prompt is also answered greedily.
    needs_greedy: ClassVar[bool] = False
    # True: its advantages get mean 0 and variance 1 over the step's tokens, as with ``advantages.whiten``.
    whitens: ClassVar[bool] = False
    # True: advantages differ within a response, so that one backward does not serve all objectives.
    by_token: ClassVar[bool] = False
    least_samples: ClassVar[int] = 1  # fewest samples of a prompt (``rollout.samples_per_prompt``)
    least_samples_because: ClassVar[str] = "every prompt needs a sample"  # why not fewer

    @abstractmethod
    def __call__(self, experience: Experience) -> Experience:
        """Return the experience with ``advantages_MBT`` and ``returns_MBT`` [M, B, T], 0 off the response."""
