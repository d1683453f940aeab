"""What every advantage estimator shares."""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import ClassVar

from gapo_mega.types import Experience


class AdvantageEstimator(ABC):
    """From token rewards to advantages, per objective.

    Options are the fields of the (data)class that implements it.
    """

    name: ClassVar[str]
    # True: ``Experience.values_MBT`` has to be there, so a critic is trained.
    needs_values: ClassVar[bool] = False
    least_samples: ClassVar[int] = 1  # of a prompt, that is ``rollout.samples_per_prompt``
    least_samples_because: ClassVar[str] = "every prompt needs a sample"  # why not fewer

    @abstractmethod
    def __call__(self, experience: Experience) -> Experience:
        """The experience with ``advantages_MBT`` and ``returns_MBT`` [M, B, T], 0 off the response."""
