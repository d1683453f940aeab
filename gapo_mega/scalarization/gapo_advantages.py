"""GAPO's formula on advantages in place of gradients: what a trainer with one gradient a step can do."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor

from gapo_mega.advantages.group import group_deviations, group_spreads
from gapo_mega.aggregation import build
from gapo_mega.option_checks import require_number
from gapo_mega.scalarization.base import Weighted


@dataclass(kw_only=True)
class GapoAdvantages(Weighted):
    """``w = GAPO(K)``, ``K_ij = mean over the batch of A_i A_j``, and ``r = sum_k w_k r_k``.

    ``A_k`` is the score less the mean of the prompt's other samples. K is the Gram matrix of the policy
    gradients only where the score functions ``grad log pi`` of all responses are orthogonal and equally
    long; in a language model they are not. The weights sum to 1. Where all scores of a batch are equal in
    every prompt, every objective has 1/M.

    ``p``: any number >= 0, as in ``gapo``.
    """

    name: ClassVar[str] = "gapo_advantages"
    least_samples: ClassVar[int] = 2

    p: float = 1.0

    def __post_init__(self) -> None:
        super().__post_init__()
        require_number("p", self.p, 0)

    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        deviations_MB = group_deviations(scores_MB, group_B, "leave_one_out")
        # What rounding leaves of equal scores is no advantage.
        deviations_MB = deviations_MB.masked_fill(group_spreads(scores_MB, group_B) == 0, 0.0)
        gram_MM = deviations_MB @ deviations_MB.T / deviations_MB.shape[1]
        weights_M = build("gapo", p=self.p, scale="sum_to_one")(gram_MM)
        return weights_M if bool(weights_M.any()) else weights_M + 1.0 / len(weights_M)
