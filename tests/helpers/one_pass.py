"""Losses of few and of many directions a sequence, and an engine's rows one by one and from one pass."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega.engine.megatron.engine import MegatronEngine
from gapo_mega.engine.megatron.gradients.one_pass import OnePass
from gapo_mega.engine.megatron.gradients.passes import SeparatePasses, Task, one_hot
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.losses import Ppo
from gapo_mega.types import Experience


def unclipped(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    return Ppo(clip_epsilon=100.0)(logprobs_BT, batch, objective)


def clipped(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """What is clipped depends on the sign of the advantage: two directions."""
    return Ppo(clip_epsilon=0.02)(logprobs_BT, batch, objective)


def by_token(logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
    """Advantages that differ within a response: as many directions as objectives."""
    weights_BT = torch.cos(torch.arange(logprobs_BT.shape[1]) * (objective + 1.0))
    return (weights_BT * logprobs_BT * batch.response_mask_BT).sum()


def rows_one_by_one(engine: MegatronEngine, task: Task) -> Tensor:
    """``[M, N]`` float64: of this rank's shard, from a pass for every objective."""
    passes = SeparatePasses(engine.policy, task)
    rows = []
    for index in range(task.objectives):
        passes.gradient(one_hot(index, task.objectives))
        rows.append(torch.cat(engine.gradients.shard.pieces).clone())
    return torch.stack(rows).double()


def rows_together(strategy: OnePass, task: Task, clock: Clock) -> tuple[Tensor, Tensor]:
    """The same from ``OnePass.measure``, and the losses ``[M]``."""
    losses = strategy.measure(task, clock)
    return torch.stack([torch.cat(row) for row in strategy._rows]).double(), losses
