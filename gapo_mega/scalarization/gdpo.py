"""GDPO: every score normalised within its prompt, then summed, then normalised over the batch.

Liu et al. 2026 (arXiv 2601.05242); the public implementations differ, and ``variant`` names them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

from torch import Tensor

from gapo_mega.option_checks import require_bool, require_choice, require_weights
from gapo_mega.scalarization.base import Scalarizer
from gapo_mega.scalarization.normalizing import (
    batch_normalized,
    group_normalized,
    others_normalized,
    token_whitened,
)
from gapo_mega.scalarization.options import weights_of

Variant = Literal["trl", "verl", "nemo", "sum_then_normalize"]


@dataclass(kw_only=True)
class Gdpo(Scalarizer):
    """``z_k = (r_k - mean) / std`` within each prompt, ``A = sum_k c_k z_k``, then a step over the batch.

    ``variant``:

    ``trl``: ``std + 1e-4`` in both steps, n - 1 in both variances, the batch step over responses
    (TRL's ``normalize_then_sum``).
    ``verl``: ``std + 1e-6``, then whitening over *tokens* with 1e-8 added to the variance, so that long
    responses weigh more.
    ``nemo``: mean and standard deviation of the *other* samples, ``std + 1e-6`` where they spread and no
    division elsewhere; the batch step over responses without an epsilon. ``leave_one_out`` false: of all
    samples.
    ``sum_then_normalize``: GRPO on the weighted sum, ``std + 1e-4``, without a batch step.

    ``weights``: c, one number >= 0 per objective, not all 0; if left out 1 each, as in all of them.
    """

    name: ClassVar[str] = "gdpo"
    gives: ClassVar[Literal["rewards", "advantages"]] = "advantages"
    least_samples: ClassVar[int] = 2

    variant: Variant = "trl"
    weights: Sequence[float] | None = None
    leave_one_out: bool = True

    def __post_init__(self) -> None:
        require_choice("variant", self.variant, get_args(Variant))
        require_weights("weights", self.weights)
        require_bool("leave_one_out", self.leave_one_out)
        if not self.leave_one_out and self.variant != "nemo":
            raise ValueError(
                f"leave_one_out: found false with variant {self.variant}, accepted: true (variant nemo alone "
                "has it)"
            )

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.weights is None else {"weights": self.weights}

    def __call__(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        scores_MB = scores_MB.double()
        weights = weights_of(self.weights, len(scores_MB))
        if self.variant == "sum_then_normalize":
            return group_normalized((weights @ scores_MB)[None], group_B, 1e-4)[0]
        if self.variant == "trl":
            return batch_normalized(weights @ group_normalized(scores_MB, group_B, 1e-4), lengths_B, 1e-4)
        if self.variant == "verl":
            return token_whitened(weights @ group_normalized(scores_MB, group_B, 1e-6), lengths_B)
        normalized = others_normalized if self.leave_one_out else group_normalized
        return batch_normalized(weights @ normalized(scores_MB, group_B, 1e-6), lengths_B, 0.0)
