"""GD2PO: GDPO without the responses on which the objectives disagree (arXiv 2606.16771)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gapo_mega.advantages.group import group_means, groups_of
from gapo_mega.option_checks import require_bool, require_choice, require_number, require_weights
from gapo_mega.scalarization.base import Scalarizer
from gapo_mega.scalarization.normalizing import group_normalized, token_whitened
from gapo_mega.scalarization.options import weights_of

Filter = Literal["hard", "snr"]

_SIGN = 1e-8  # normalised scores of a smaller size have no sign
_EPSILON = 1e-6  # verl's, on the standard deviation of a prompt


@dataclass(kw_only=True)
class Gd2po(Scalarizer):
    """GDPO in verl's variant, in which responses with conflicting signs of the ``z_k`` get advantage 0.

    ``filter``: ``hard`` drops a response where some ``z_k`` is positive and another negative. ``snr`` drops
    it only if also ``|sum_k z_k| / sum_k |z_k| < tau``, which is the milder one with three objectives or
    more. ``tau``: a number from 0 to 1. ``reweight``: the sum is multiplied by the share of its prompt's
    responses that are kept, *before* it is whitened over the kept tokens. ``weights``: one number >= 0 per
    objective for the sum, not all 0; if left out 1 each. They do not change what is dropped.

    A dropped response stays in the loss's number of tokens. ``kept`` in the log is the share kept.
    """

    name: ClassVar[str] = "gd2po"
    gives: ClassVar[Literal["rewards", "advantages"]] = "advantages"
    least_samples: ClassVar[int] = 2

    filter: Filter = "hard"
    tau: float = 0.8
    reweight: bool = True
    weights: Sequence[float] | None = None

    def __post_init__(self) -> None:
        require_choice("filter", self.filter, get_args(Filter))
        require_number("tau", self.tau, 0, 1)
        require_bool("reweight", self.reweight)
        require_weights("weights", self.weights)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.weights is None else {"weights": self.weights}

    def __call__(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        normalized_MB = group_normalized(scores_MB, group_B, _EPSILON)
        kept_B = self._kept(normalized_MB)
        summed_B = weights_of(self.weights, len(scores_MB)) @ normalized_MB
        if self.reweight:
            summed_B = summed_B * _share_of_group(kept_B, group_B)
        whitened_B = token_whitened(torch.where(kept_B, summed_B, 0.0), lengths_B * kept_B)
        return torch.where(kept_B, whitened_B, 0.0)

    def facts(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> dict[str, float]:
        """``kept``: the share of responses that are not dropped."""
        return {"kept": float(self._kept(group_normalized(scores_MB, group_B, _EPSILON)).double().mean())}

    def _kept(self, normalized_MB: Tensor) -> Tensor:
        conflict_B = (normalized_MB > _SIGN).any(dim=0) & (normalized_MB < -_SIGN).any(dim=0)
        if self.filter == "snr":
            agreement_B = normalized_MB.sum(dim=0).abs() / (normalized_MB.abs().sum(dim=0) + _SIGN)
            conflict_B = conflict_B & (agreement_B < self.tau)
        kept_B: Tensor = ~conflict_B
        return kept_B


def _share_of_group(kept_B: Tensor, group_B: Tensor) -> Tensor:
    """The share of each response's prompt that is kept, float64 [B]."""
    member_B, counts_G = groups_of(group_B)
    return group_means(kept_B.double()[None], member_B, counts_G)[0, member_B]
