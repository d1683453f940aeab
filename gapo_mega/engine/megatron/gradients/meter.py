"""What one update measures of the policy, from the forwards that it runs anyway."""

from __future__ import annotations

import math

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.engine.base import PolicyFacts, PolicyLossSum
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.losses.base import clips_of
from gapo_mega.losses.statistics import PolicyStatistics, policy_statistics
from gapo_mega.types import Experience


class Meter:
    """Adds up the statistics of each microbatch of this rank once, on the last pipeline stage.

    Strategies compute losses differently often, but always of all microbatches before of one again: so the
    first ``microbatches`` calls count. They all come before the step.
    """

    def __init__(self, loss: PolicyLossSum, objectives: int, microbatches: int, entropy: bool) -> None:
        """``entropy``: ``take`` gets entropies."""
        self._loss = loss
        self._objectives = objectives
        self._left = microbatches
        self._entropy = entropy
        self._found: list[tuple[PolicyStatistics, Tensor]] = []

    def take(self, logprobs_BT: Tensor, entropy_BT: Tensor | None, batch: Experience) -> None:
        """Measure a microbatch, unless all have been. Waits for no device."""
        if self._left == 0:
            return
        self._left -= 1
        entropy = logprobs_BT.new_zeros(()) if entropy_BT is None else entropy_BT.detach()
        found = policy_statistics(self._loss, logprobs_BT.detach(), batch, self._objectives)
        self._found.append((found, entropy.double().sum()))

    def facts(self, groups: Groups) -> PolicyFacts:
        """Over all ranks. Collective: two all-reduces of a few numbers."""
        names = clips_of(self._loss)
        sums = torch.zeros(4 + self._objectives * len(names), dtype=torch.float64)
        extremes = torch.full((2,), -torch.inf, dtype=torch.float64)
        for found, entropy in self._found:
            parts = [found.tokens, found.kl, found.surprisal, entropy]
            sums += torch.cat([torch.stack(parts), found.clipped_MC.flatten()]).cpu()
            ends = torch.stack([-found.least_log_ratio, found.greatest_log_ratio])
            extremes = torch.maximum(extremes, ends.cpu())
        everything = groups.from_last_stage(torch.cat([extremes, sums]))
        extremes, sums = everything[:2].clone(), groups.sum_over_data(everything[2:])
        dist.all_reduce(extremes, op=dist.ReduceOp.MAX, group=groups.data)
        tokens, sums = float(sums[0]), sums[1:]
        if tokens == 0:
            sums, extremes = sums * torch.nan, extremes * torch.nan
        kl, surprisal, entropy_mean, *clipped = (sums / max(tokens, 1.0)).tolist()
        count = len(names)
        return PolicyFacts(
            clipped={name: clipped[c::count] for c, name in enumerate(names)},
            kl=kl,
            ratio_min=math.exp(-float(extremes[0])),
            ratio_max=math.exp(float(extremes[1])),
            entropy_estimate=surprisal,
            entropy=entropy_mean if self._entropy else None,
        )
