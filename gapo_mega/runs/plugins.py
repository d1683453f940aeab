"""Asks the user's own plug-ins on made-up data, before a run starts: they may give anything."""

from __future__ import annotations

import dataclasses

import torch
from torch import Tensor

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.config import Config
from gapo_mega.types import Experience

_MOST_SAMPLES = 256  # of a made-up prompt: a plan of absurdly many would not fit into memory


def check_estimator(config: Config, estimator: AdvantageEstimator) -> None:
    """Raise ``ValueError`` unless the estimator gives advantages of the shape of the rewards.

    Those of the user's own are not known to.
    """
    objectives, samples = len(config.objectives), min(config.rollout.samples_per_prompt, _MOST_SAMPLES)
    batch = made_up_batch(objectives, prompts=2, samples=samples)
    # The score is the reward of the last token.
    rewards_MBT = batch.token_rewards_MBT * torch.tensor([0.0, 0.0, 0.0, 1.0])
    scored = dataclasses.replace(
        batch,
        token_rewards_MBT=rewards_MBT,
        kl_rewards_BT=torch.zeros_like(batch.old_logprobs_BT),
        greedy_scores_MB=torch.zeros_like(batch.scores_MB) if estimator.needs_greedy else None,
        values_MBT=batch.values_MBT if estimator.needs_values else None,
        advantages_MBT=None,
        returns_MBT=None,
    )
    found: object = estimator(scored)
    if not isinstance(found, Experience):
        raise ValueError(
            f"advantages.name: found {config.advantages.name}, which gives {shown(found)}, accepted: an "
            "estimator that gives the experience with advantages_MBT and returns_MBT"
        )
    parts = {"advantages_MBT": found.advantages_MBT}
    if estimator.needs_values:  # the critic learns them
        parts["returns_MBT"] = found.returns_MBT
    for part, given in parts.items():
        value: object = given
        if not _like_rewards(value, scored):
            raise ValueError(
                f"advantages.name: found {config.advantages.name}, whose {part} is {shown(value)}, accepted: "
                f"a tensor of finite numbers, 0 off the response, here of shape {list(rewards_MBT.shape)}"
            )


def _like_rewards(value: object, batch: Experience) -> bool:
    """Whether it is a tensor of finite numbers [M, B, T] that are 0 off the response."""
    if not isinstance(value, Tensor) or value.shape != batch.token_rewards_MBT.shape:
        return False
    return bool(value.isfinite().all()) and not bool(value[:, ~batch.response_mask_BT].any())


def made_up_batch(objectives: int, prompts: int = 1, samples: int = 2) -> Experience:
    """Responses of three tokens, every second one worse than the one before."""
    rows = prompts * samples
    mask_BT = torch.tensor([[False, True, True, True]] * rows)
    signs_B = 1.0 - 2.0 * (torch.arange(rows) % 2)
    signs_MBT = signs_B.view(1, rows, 1).expand(objectives, rows, 4) * mask_BT
    return Experience(
        tokens_BT=torch.ones(rows, 4, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.arange(prompts).repeat_interleave(samples),
        old_logprobs_BT=torch.full((rows, 4), -1.0) * mask_BT,
        ref_logprobs_BT=torch.full((rows, 4), -1.0) * mask_BT,
        scores_MB=signs_MBT[:, :, 1],
        token_rewards_MBT=signs_MBT,
        values_MBT=torch.zeros(objectives, rows, 4),
        advantages_MBT=signs_MBT,
        returns_MBT=signs_MBT,
    )


def shown(found: object) -> str:
    """What something is, in the words of an error."""
    return f"shape {list(found.shape)}" if isinstance(found, Tensor) else type(found).__name__
