"""The loss of Dr. GRPO (Liu et al. 2025, arXiv 2503.20783)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from gapo_mega.losses.normalization import Normalization
from gapo_mega.losses.ppo import Ppo


@dataclass(frozen=True, kw_only=True)
class DrGrpo(Ppo):
    """The loss of ``ppo`` with other defaults: no length divides it, but the longest that there may be.

    ``1 / (S L) sum_i sum_t -min(rho A, clip(rho) A)``, L = ``rollout.max_new_tokens``. Its other half, no
    division by the spread of scores, is in the advantages: ``name: grpo`` with ``normalize: false``.
    """

    name: ClassVar[str] = "dr_grpo"

    clip_epsilon: float = 0.2
    normalization: Normalization = "fixed_length"
