"""A step's batch as it is over all data-parallel ranks, for what has to see all of it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.engine.base import Ranks
from gapo_mega.types import Experience

_MOST_PROMPTS = 1_000_000  # of one rank: group numbers of different ranks must differ


@dataclass(frozen=True)
class WholeBatch:
    """Scores, groups and lengths of all data ranks' responses, in rank order; the same on every rank."""

    scores_MB: Tensor  # as the experience has them
    group_B: Tensor  # int64; differs between ranks
    lengths_B: Tensor  # int64: response tokens
    own: slice  # this rank's responses


def whole_batch(engine: Ranks, experience: Experience) -> WholeBatch:
    """Gather the batch. Collective over the data-parallel ranks."""
    lengths_B = experience.response_mask_BT.sum(dim=1)
    parts = engine.gather_over_data((experience.scores_MB, experience.group_B, lengths_B))
    sizes = [len(group_B) for _, group_B, _ in parts]
    before = sum(sizes[: engine.layout.data_rank])
    return WholeBatch(
        scores_MB=torch.cat([scores_MB for scores_MB, _, _ in parts], dim=1),
        group_B=torch.cat([group_B + _MOST_PROMPTS * i for i, (_, group_B, _) in enumerate(parts)]),
        lengths_B=torch.cat([lengths_B for _, _, lengths_B in parts]),
        own=slice(before, before + sizes[engine.layout.data_rank]),
    )
