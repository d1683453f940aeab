"""RVPO: a soft minimum of the normalised scores, which penalises their variance (arXiv 2605.05750)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from gapo_mega.option_checks import require_choice, require_number
from gapo_mega.scalarization.base import Scalarizer
from gapo_mega.scalarization.normalizing import batch_normalized, group_normalized, token_whitened

Whiten = Literal["none", "samples", "tokens"]


@dataclass(kw_only=True)
class Rvpo(Scalarizer):
    """``A = -(1/k) ln mean_j exp(-k z_j)``, ``z_j = (r_j - mean) / (std + epsilon)`` within each prompt.

    ``k``: a number > 0; towards 0 the mean of the z_j, large: their minimum. ``whiten``: a step over the
    batch's responses or tokens, as GDPO has it; the paper's formula has none. ``epsilon``: a number >= 0.
    """

    name: ClassVar[str] = "rvpo"
    gives: ClassVar[Literal["rewards", "advantages"]] = "advantages"
    least_samples: ClassVar[int] = 2

    k: float = 1.0
    whiten: Whiten = "none"
    epsilon: float = 1e-6

    def __post_init__(self) -> None:
        require_number("k", self.k, 0, above=True)
        require_choice("whiten", self.whiten, get_args(Whiten))
        require_number("epsilon", self.epsilon, 0)

    def __call__(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        normalized_MB = group_normalized(scores_MB, group_B, self.epsilon)
        summed_B = (-self.k * normalized_MB).logsumexp(dim=0) - math.log(len(scores_MB))
        advantages_B = -summed_B / self.k
        if self.whiten == "samples":
            return batch_normalized(advantages_B, lengths_B, self.epsilon)
        return token_whitened(advantages_B, lengths_B) if self.whiten == "tokens" else advantages_B
