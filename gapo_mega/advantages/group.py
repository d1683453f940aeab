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
from gapo_mega.advantages.rewards import kl_returns, score_returns
from gapo_mega.option_checks import require_bool, require_choice, require_number
from gapo_mega.types import Experience

Baseline = Literal["leave_one_out", "mean"]

BECAUSE = "a sample is compared with the others of its prompt"

# Scores of a group within this share of their size are equal up to rounding: four steps of float32.
_EQUAL = 4 * torch.finfo(torch.float32).eps


def group_deviations(x_MB: Tensor, group_B: Tensor, baseline: Baseline) -> Tensor:
    """``x`` [M, B] minus the group's baseline, in float64; rows with equal ``group_B`` form a group.

    Raises ``ValueError`` for a group of a single sample: nothing is left to compare it with.
    """
    member_B, counts_G = groups_of(group_B)
    deviation_MB = _centred(x_MB.double(), member_B, counts_G)
    if baseline == "mean":
        return deviation_MB
    # R_i - mean of the others = (R_i - mean of all) n / (n - 1)
    factor_G = counts_G / (counts_G - 1).double()
    return deviation_MB * factor_G[member_B]


def group_spreads(x_MB: Tensor, group_B: Tensor) -> Tensor:
    """Standard deviation [M, B] of each row's group in float64, n - 1 in the denominator.

    It is 0 where the group's values are equal up to the rounding of float32, whatever is left of them then.
    """
    member_B, counts_G = groups_of(group_B)
    x_MB = x_MB.double()
    squares_MG = _sums(_centred(x_MB, member_B, counts_G).square(), member_B, counts_G)
    spread_MB = (squares_MG / (counts_G - 1)).sqrt()[:, member_B]
    at_MB = member_B.expand_as(x_MB)
    empty_MG = x_MB.new_zeros(x_MB.shape[0], len(counts_G))
    highest_MG = empty_MG.scatter_reduce(1, at_MB, x_MB, "amax", include_self=False)
    lowest_MG = empty_MG.scatter_reduce(1, at_MB, x_MB, "amin", include_self=False)
    size_MG = torch.maximum(highest_MG.abs(), lowest_MG.abs())
    equal_MG = highest_MG - lowest_MG <= _EQUAL * size_MG
    return torch.where(equal_MG[:, member_B], 0.0, spread_MB)


def groups_of(group_B: Tensor) -> tuple[Tensor, Tensor]:
    """Each row's group as a number from 0 [B], and the groups' sizes [G].

    Raises ``ValueError`` for a group of a single sample.
    """
    _, member_B, counts_G = torch.unique(group_B, return_inverse=True, return_counts=True)
    if bool((counts_G < 2).any()):
        alone = int((counts_G < 2).sum())
        raise ValueError(
            f"rollout.samples_per_prompt: {alone} of {counts_G.numel()} prompts have a single sample, "
            f"accepted: at least 2, because {BECAUSE}"
        )
    return member_B, counts_G


def _centred(x_MB: Tensor, member_B: Tensor, counts_G: Tensor) -> Tensor:
    return x_MB - group_means(x_MB, member_B, counts_G)[:, member_B]


def group_means(x_MB: Tensor, member_B: Tensor, counts_G: Tensor) -> Tensor:
    """The mean over each of ``groups_of``, [M, G]."""
    return _sums(x_MB, member_B, counts_G) / counts_G


def _sums(x_MB: Tensor, member_B: Tensor, counts_G: Tensor) -> Tensor:
    """The sum over each group, [M, G]."""
    return x_MB.new_zeros(x_MB.shape[0], len(counts_G)).index_add(1, member_B, x_MB)


def group_advantages(experience: Experience, baseline: Baseline, epsilon: float | None) -> Experience:
    """Fill in what ``Group`` describes; ``epsilon`` None leaves the scores as wide as they are."""
    mask_BT, group_B = experience.response_mask_BT, experience.group_B
    # Apart and in float64: beside a large score, float32 has no digit left for a small KL reward.
    score_MB, kl_MB = score_returns(experience), kl_returns(experience)
    advantages_MB = group_deviations(score_MB, group_B, baseline)
    if epsilon is not None:
        spread_MB = group_spreads(score_MB, group_B)
        advantages_MB = torch.where(spread_MB == 0, 0.0, advantages_MB / (spread_MB + epsilon))
    advantages_MB = advantages_MB + group_deviations(kl_MB, group_B, baseline)
    dtype = experience.token_rewards_MBT.dtype
    return replace(
        experience,
        advantages_MBT=torch.where(mask_BT, advantages_MB.to(dtype)[:, :, None], 0.0),
        returns_MBT=(score_MB + kl_MB).to(dtype)[:, :, None] * mask_BT,
    )


def check_normalization(normalize: bool, epsilon: float) -> None:
    """Raise ``ValueError`` unless they are true or false, and a finite number >= 0."""
    require_bool("normalize", normalize)
    require_number("epsilon", epsilon, 0)


@dataclass(frozen=True, kw_only=True)
class Group(AdvantageEstimator):
    """Advantage = return of the sequence minus the group's baseline, the same for all its tokens.

    The return is the undiscounted sum of the token rewards: score and KL reward. ``baseline``:
    ``leave_one_out``, the mean of the other samples (unbiased), or ``mean``, of all samples.
    ``normalize`` divides the score's part by the standard deviation of the group's scores (n - 1 in the
    denominator) plus ``epsilon``, per objective. It leaves the KL reward's part as it is: ``kl_beta`` then
    weighs divergence against scores of spread 1, and a group whose scores are all equal has the KL reward's
    part alone. ``epsilon``: a number >= 0; TRL has 1e-4, verl 1e-6. ``returns_MBT`` holds the sequence's
    return.
    """

    name: ClassVar[str] = "group"
    needs_values: ClassVar[bool] = False
    least_samples: ClassVar[int] = 2
    least_samples_because: ClassVar[str] = BECAUSE

    baseline: Baseline = "leave_one_out"
    normalize: bool = False
    epsilon: float = 1e-4

    def __post_init__(self) -> None:
        require_choice("baseline", self.baseline, get_args(Baseline))
        check_normalization(self.normalize, self.epsilon)

    def __call__(self, experience: Experience) -> Experience:
        return group_advantages(experience, self.baseline, self.epsilon if self.normalize else None)
