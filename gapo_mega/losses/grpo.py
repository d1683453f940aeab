"""The loss of GRPO (Shao et al. 2024, arXiv 2402.03300, eq. 3), without its KL term."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gapo_mega.losses.normalization import Normalization
from gapo_mega.losses.ppo import Ppo


@dataclass(frozen=True, kw_only=True)
class Grpo(Ppo):
    """The loss of ``ppo`` with other defaults: each response's mean over its tokens, then their mean.

    ``1 / S sum_i 1 / |o_i| sum_t -min(rho A, clip(rho) A)``. What else makes GRPO is not in the loss: the
    advantages of ``advantages.name: grpo``, and the KL term, which ``algorithm`` has.
    """

    name: ClassVar[str] = "grpo"

    clip_epsilon: float = 0.2
    normalization: Normalization = "sequence_mean"
