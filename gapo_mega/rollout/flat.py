"""Prompts whose samples all have the same score, from which no gradient comes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch
from torch import Tensor

from gapo_mega.advantages.group import group_spreads
from gapo_mega.engine.base import Engine
from gapo_mega.types import Experience


def flat(experience: Experience) -> Tensor:
    """bool [M, B]: the scores of the row's prompt are equal, up to the rounding of float32."""
    return group_spreads(experience.scores_MB, experience.group_B) == 0


def without_flat(experience: Experience) -> Experience:
    """The same without the responses to prompts that are flat in *every* objective.

    Their rows stay, so that all ranks keep equally many, and have no response token: nothing counts them. A
    prompt that is flat in some objectives only still teaches the others, and stays.
    """
    mask_BT = experience.response_mask_BT & ~flat(experience).all(dim=0)[:, None]
    kept = None if experience.kept is None else experience.kept.where(mask_BT)
    return replace(experience, response_mask_BT=mask_BT, kept=kept)


def flat_counts(engine: Engine, names: Sequence[str], experience: Experience) -> dict[str, float]:
    """Prompts of the step that are flat in each objective, and in all. Collective over the data ranks."""
    flat_MB = flat(experience)
    rows_MB = torch.cat([flat_MB, flat_MB.all(dim=0, keepdim=True)])
    _, member_B, counts_G = torch.unique(experience.group_B, return_inverse=True, return_counts=True)
    prompts = engine.sum_over_data((rows_MB / counts_G[member_B].double()).sum(dim=1)).tolist()
    return {
        **{f"flat_groups/{name}": count for name, count in zip(names, prompts[:-1], strict=True)},
        "flat_in_every_objective": prompts[-1],
    }
