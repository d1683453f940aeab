"""CTWA: weights that grow while an objective does not vary with the training signal (arXiv 2602.06869)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.advantages.group import group_deviations, group_means, groups_of
from gapo_mega.option_checks import require_bool, require_number, require_preference
from gapo_mega.scalarization.base import Weighted
from gapo_mega.scalarization.normalizing import group_normalized
from gapo_mega.scalarization.options import preference_of

_EPSILON = 1e-8  # prompts whose spreads have a smaller product say nothing about correlation


@dataclass(kw_only=True)
class Ctwa(Weighted):
    """``r = sum_k w_k r_k / sum_k w_k``; after every batch ``ln w_k += rate max(target - c_k, 0)``.

    ``c_k``: running mean (``decay`` of what was) of the covariance of the score r_k with the advantage A,
    within a prompt, mean over prompts; A is r normalised within the prompt. ``correlation`` true takes the
    correlation in place of the covariance, which does not depend on the scores' scales. A batch is weighed
    by what the batches before it gave. ``preference``: the weights at the start, > 0 with sum 1; if left
    out 1/M. ``rate``: >= 0. ``target``: what c_k should reach.

    An approximation: the paper multiplies A by the mean over tokens of the probability ratio
    where PPO does not clip it, at the policy *after* updates. Here the weight is that of the policy which
    sampled: ratios are 1 and nothing is clipped, exactly what the first update of a rollout sees. The
    authors' code does not divide by the sum of the weights; dividing keeps the reward's scale, against
    which ``kl_beta`` is set, and changes nothing for estimators that normalise.
    """

    name: ClassVar[str] = "ctwa"
    least_samples: ClassVar[int] = 2

    preference: Sequence[float] | None = None
    rate: float = 0.1
    target: float = 0.1
    decay: float = 0.9
    correlation: bool = True
    _log_weights: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _running: list[float] = field(default_factory=list, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        require_preference("preference", self.preference, zeros=False)
        require_number("rate", self.rate, 0)
        require_number("target", self.target)
        require_number("decay", self.decay, 0, 1)
        require_bool("correlation", self.correlation)

    def per_objective(self) -> Mapping[str, Sequence[float]]:
        return {} if self.preference is None else {"preference": self.preference}

    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        return self._logs(len(scores_MB)).softmax(dim=0)

    def commit(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> None:
        rewards_B = self(scores_MB, group_B, lengths_B)
        advantages_B = group_normalized(rewards_B[None], group_B, 1e-6)[0]
        found = within_prompts(scores_MB.double(), advantages_B, group_B, self.correlation)
        before = torch.tensor(self._running, dtype=torch.float64) if self._running else found
        running = self.decay * before + (1 - self.decay) * found
        logs = self._logs(len(scores_MB)) + self.rate * (self.target - running).clamp(min=0)
        self._running, self._log_weights = running.tolist(), logs.tolist()

    def facts(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> dict[str, float]:
        """Also the running means so far, as ``covariance/NAME``."""
        running = dict(zip(self._names, self._running, strict=True)) if self._running else {}
        named = {f"covariance/{name}": value for name, value in running.items()}
        return super().facts(scores_MB, group_B, lengths_B) | named

    def state_dict(self) -> dict[str, Any]:
        return {"log_weights": self._log_weights, "running": self._running}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._log_weights = [float(x) for x in state["log_weights"]]
        self._running = [float(x) for x in state["running"]]

    def _logs(self, count: int) -> Tensor:
        if self._log_weights:
            return torch.tensor(self._log_weights, dtype=torch.float64)
        return preference_of(self.preference, count).log()


def within_prompts(scores_MB: Tensor, weights_B: Tensor, group_B: Tensor, correlation: bool) -> Tensor:
    """Covariance or correlation of scores and weights within a prompt, n in it, mean over prompts [M].

    Correlations are of the prompts in which both spread; 0 where there is none.
    """
    groups = groups_of(group_B)
    centred_MB = group_deviations(scores_MB, group_B, "mean")
    weight_1B = group_deviations(weights_B[None], group_B, "mean")
    covariance_MG = group_means(centred_MB * weight_1B, *groups)
    if not correlation:
        return covariance_MG.mean(dim=1)
    squares_MG = group_means(centred_MB.square(), *groups)
    spreads_MG = (squares_MG * group_means(weight_1B.square(), *groups)).sqrt()
    valid_MG = spreads_MG > _EPSILON
    correlation_MG = torch.where(valid_MG, covariance_MG / spreads_MG.where(valid_MG, 1.0), 0.0)
    return correlation_MG.sum(dim=1) / valid_MG.sum(dim=1).clamp(min=1)
