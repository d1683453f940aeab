"""Critic-free advantages: every sample against the other samples of its prompt.

Leave-one-out is RLOO (Ahmadian et al. 2024); the group mean, normalised by the group's standard
deviation, is GRPO (Shao et al. 2024).
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar, Literal, get_args

import torch
from torch import Tensor

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.types import Experience

Baseline = Literal["leave_one_out", "mean"]

# Returns of a group that differ by less than this share of their size are equal up to float32 rounding.
_EQUAL = 1e-6


def group_advantages(returns_MB: Tensor, group_B: Tensor, baseline: Baseline, normalize: bool) -> Tensor:
    """Advantages [M, B] of sequence returns [M, B]; rows with equal ``group_B`` form a group.

    Raises ``ValueError`` for a group of a single sample: nothing is left to compare it with.
    """
    _, member_B, counts_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    if bool((counts_G < 2).any()):
        alone = int((counts_G < 2).sum())
        raise ValueError(
            f"rollout.samples_per_prompt: {alone} of {counts_G.numel()} prompts have a single sample, "
            "accepted: at least 2 for advantages.name group"
        )
    count_B: Tensor = counts_G[member_B].to(returns_MB.dtype)
    groups = counts_G.numel()
    deviation_MB = returns_MB - _group_sum(returns_MB, member_B, groups) / count_B
    advantages_MB = deviation_MB
    if baseline == "leave_one_out":
        # R_i - mean of the others = (R_i - mean of all) n / (n - 1)
        advantages_MB = deviation_MB * count_B / (count_B - 1)
    if normalize:
        variance_MB = _group_sum(deviation_MB.square(), member_B, groups) / (count_B - 1)
        size_MB = (_group_sum(returns_MB.square(), member_B, groups) / count_B).sqrt()
        spread_MB = variance_MB.sqrt()
        equal_MB = spread_MB <= _EQUAL * size_MB
        advantages_MB = torch.where(equal_MB, 0.0, advantages_MB / torch.where(equal_MB, 1.0, spread_MB))
    return advantages_MB


def _group_sum(x_MB: Tensor, member_B: Tensor, groups: int) -> Tensor:
    """The sum over each row's group, in every row of the group."""
    sums_MG = x_MB.new_zeros(x_MB.shape[0], groups).index_add(1, member_B, x_MB)
    return sums_MG.index_select(1, member_B)


@dataclass(frozen=True, kw_only=True)
class Group(AdvantageEstimator):
    """Advantage = return of the sequence minus the group's baseline, the same for all its tokens.

    The return is the undiscounted sum of the token rewards (KL reward included). ``baseline``:
    ``leave_one_out``, the mean of the other samples (unbiased), or ``mean``, of all samples.
    ``normalize`` divides by the group's standard deviation (n - 1 in the denominator), per objective;
    groups whose returns are all equal get 0. ``returns_MBT`` holds the sequence's return.
    """

    name: ClassVar[str] = "group"
    needs_values: ClassVar[bool] = False
    least_samples: ClassVar[int] = 2
    least_samples_because: ClassVar[str] = "a sample is compared with the others of its prompt"

    baseline: Baseline = "leave_one_out"
    normalize: bool = False

    def __post_init__(self) -> None:
        if self.baseline not in get_args(Baseline):
            raise ValueError(f"baseline: found {self.baseline!r}, accepted: {', '.join(get_args(Baseline))}")
        if not isinstance(self.normalize, bool):
            raise ValueError(f"normalize: found {self.normalize!r}, accepted: true, false")

    def __call__(self, experience: Experience) -> Experience:
        mask_BT = experience.response_mask_BT
        returns_MB = torch.where(mask_BT, experience.token_rewards_MBT, 0.0).sum(dim=2)
        advantages_MB = group_advantages(returns_MB, experience.group_B, self.baseline, self.normalize)
        return replace(
            experience,
            advantages_MBT=advantages_MB[:, :, None] * mask_BT,
            returns_MBT=returns_MB[:, :, None] * mask_BT,
        )
