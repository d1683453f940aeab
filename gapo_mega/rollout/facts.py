"""What the log says about a step's batch, over all data-parallel ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations

import torch
from torch import Tensor

from gapo_mega.engine.base import Engine
from gapo_mega.rollout.flat import flat_counts
from gapo_mega.rollout.mismatch import mismatch
from gapo_mega.rollout.whole_batch import whole_batch
from gapo_mega.types import Experience, Rollout


@dataclass(frozen=True)
class BatchFacts:
    """Means over a step's whole batch; the same on every rank."""

    rewards: list[float]  # per objective
    spreads: list[float]  # per objective: standard deviation over samples, 0 where all are alike
    kl: float  # per response token: log pi - log pi_ref of the sampled tokens
    tokens: float  # of prompts and responses
    extra: dict[str, float]  # what the log takes as it is, by the log's name


def batch_facts(
    engine: Engine, names: Sequence[str], rollout: Rollout, experience: Experience, samples: int
) -> BatchFacts:
    """Measure the batch. Collective over the data-parallel ranks.

    ``reward_correlation`` is measured between several objectives where prompts have several ``samples``.
    """
    several = len(names) > 1 and samples > 1
    mask_BT = rollout.response_mask_BT  # that of the experience may leave prompts out
    kl_BT = (experience.old_logprobs_BT - experience.ref_logprobs_BT) * mask_BT
    counts = [
        kl_BT.double().sum(),
        mask_BT.sum().double(),
        torch.tensor(float(rollout.batch_size), dtype=torch.float64),
        rollout.prompt_lengths_B.sum().double(),
        rollout.finished_B.sum().double(),
    ]
    sums = torch.cat([experience.scores_MB.double().sum(dim=1), torch.stack(counts)])
    *scores, kl, tokens, rows, prompt_tokens, finished = engine.sum_over_data(sums).tolist()
    rewards = [score / rows for score in scores]
    extra = {
        "prompt_length": prompt_tokens / rows,
        "response_length": tokens / rows,
        "finished": finished / rows,
        **_gap(engine, rollout, experience),
    }
    return BatchFacts(
        rewards=rewards,
        spreads=_spreads(engine, experience.scores_MB, rewards, rows),
        kl=kl / max(tokens, 1.0),
        tokens=tokens + prompt_tokens,
        extra=extra
        | (_correlations(engine, names, experience) if several else {})
        | (flat_counts(engine, names, experience) if samples > 1 else {}),
    )


def _spreads(engine: Engine, scores_MB: Tensor, means: Sequence[float], rows: float) -> list[float]:
    scores = scores_MB.double()
    centred = scores - torch.tensor(means, dtype=torch.float64)[:, None]
    sums = torch.stack([centred.square().sum(dim=1), scores.square().sum(dim=1)])
    deviation, size = (engine.sum_over_data(sums.flatten()) / rows).sqrt().view(2, -1)
    # Scores are float32 numbers: what spreads by less than their distance is constant.
    constant = deviation <= torch.finfo(torch.float32).eps * size
    spreads: list[float] = deviation.masked_fill(constant, 0.0).tolist()
    return spreads


def _gap(engine: Engine, rollout: Rollout, experience: Experience) -> dict[str, float]:
    """How the trainer's log-probabilities differ from the generator's.

    Empty where the trainer takes the generator's own.
    """
    if experience.old_logprobs_BT is rollout.logprobs_BT:
        return {}
    return mismatch(engine, experience.old_logprobs_BT, rollout.logprobs_BT, rollout.response_mask_BT)


def _correlations(engine: Engine, names: Sequence[str], experience: Experience) -> dict[str, float]:
    batch = whole_batch(engine, experience)
    matrix = reward_correlation(batch.scores_MB, batch.group_B)
    return {
        f"reward_correlation/{names[i]}/{names[j]}": float(matrix[i, j])
        for i, j in combinations(range(len(names)), 2)
    }


def reward_correlation(scores_MB: Tensor, group_B: Tensor) -> Tensor:
    """Pearson correlation of the objectives *within* groups (samples of one prompt), float64 ``[M, M]``.

    Scores are centred on their group's mean and pooled, so that prompts that are easy on every objective do
    not hide objectives that rank responses differently. NaN where an objective never varies within a group.
    """
    scores = scores_MB.double()
    _, index_B = torch.unique(group_B, return_inverse=True)
    counts = torch.bincount(index_B).double()
    sums = scores.new_zeros(scores.shape[0], len(counts)).index_add_(1, index_B, scores)
    centred = scores - (sums / counts)[:, index_B]
    covariance = centred @ centred.T
    # Rounding leaves a constant objective with a tiny variance, which would pass for a real one. Scores are
    # float32 numbers, so what spreads by less than their distance is constant.
    scale = torch.finfo(torch.float32).eps * scores.square().sum(dim=1).sqrt()
    deviation = covariance.diagonal().sqrt()
    deviation = torch.where(deviation > scale, deviation, torch.full_like(deviation, torch.nan))
    return (covariance / deviation[:, None] / deviation[None, :]).clamp(-1, 1)
