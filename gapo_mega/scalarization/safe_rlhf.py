"""Safe RLHF: PPO-Lagrangian, a multiplier that grows while costs are too high (Dai et al., ICLR 2024)."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.option_checks import require_number
from gapo_mega.registry import unknown
from gapo_mega.scalarization.base import Weighted


@dataclass(kw_only=True)
class SafeRlhf(Weighted):
    """``r = (R - sum_j lambda_j C_j) / (1 + sum_j lambda_j)``, C_j = -score of the costs, R the others' mean.

    ``lambda = exp(l)``; at every batch ``l += lambda_lr lambda (mean cost - threshold)``, where the mean is
    over the last ``window`` costs, this batch's included, and l stays at most ``ln lambda_max``. A batch
    is weighed by the lambda that has seen it, as in the authors' code. With a critic the run values every
    objective apart, ``A = (A_R - lambda A_C) / (1 + lambda)``.

    ``costs``: names of the objectives that are costs; if left out, the last one. Scores are higher for what
    is better, so a cost model's objective gives -C. ``threshold``: the mean cost that is accepted.
    ``lambda_init``: > 0. ``delay_steps``: batches before the first change. Defaults: the paper's Table 2.

    The authors' code differs: its window is of one process, it changes lambda before every optimizer
    step and not before every rollout, and it halves the KL coefficient.
    """

    name: ClassVar[str] = "safe_rlhf"

    costs: Sequence[str] | None = None
    threshold: float = 0.0
    lambda_init: float = 1.0
    lambda_lr: float = 0.01
    lambda_max: float = 10.0
    window: int = 128
    delay_steps: int = 0
    _at: list[int] = field(default_factory=list, init=False, repr=False, compare=False)
    _logs: list[float] = field(default_factory=list, init=False, repr=False, compare=False)
    _recent: list[list[float]] = field(default_factory=list, init=False, repr=False, compare=False)
    _steps: int = field(default=0, init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        super().__post_init__()
        costs = self.costs
        listed = costs is None or (isinstance(costs, list | tuple) and all(isinstance(x, str) for x in costs))
        if not listed or (costs is not None and (not costs or len(set(costs)) != len(costs))):
            raise ValueError(f"costs: found {costs!r}, accepted: a list of different names of objectives")
        require_number("threshold", self.threshold)
        require_number("lambda_init", self.lambda_init, 0, above=True)
        require_number("lambda_lr", self.lambda_lr, 0)
        require_number("lambda_max", self.lambda_max, 0, above=True)
        for option, value, least in (("window", self.window, 1), ("delay_steps", self.delay_steps, 0)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{option}: found {value!r}, accepted: a whole number >= {least}")
        if self.lambda_init > self.lambda_max:
            raise ValueError(
                f"lambda_init: found {self.lambda_init}, accepted: at most lambda_max {self.lambda_max}"
            )

    def prepare(self, names: Sequence[str]) -> None:
        super().prepare(names)
        costs = [names[-1]] if self.costs is None else self.costs
        for name in costs:
            if name not in names:
                raise ValueError(unknown("costs", name, names))
        if len(costs) == len(names):
            raise ValueError(f"costs: found all {len(names)} objectives, accepted: some of them")
        self._at = [list(names).index(name) for name in costs]

    def coefficients(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> Tensor:
        logs, _ = self._next(scores_MB)
        found = torch.full((len(scores_MB),), 1.0 / (len(scores_MB) - len(logs)), dtype=torch.float64)
        multipliers = torch.tensor(logs, dtype=torch.float64).exp()
        found[self._costs(len(scores_MB))] = multipliers
        return found / (1.0 + multipliers.sum())

    def facts(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> dict[str, float]:
        """Also every multiplier, as ``lambda/NAME``."""
        logs, _ = self._next(scores_MB)
        named = {
            f"lambda/{self._names[i]}": math.exp(log)
            for i, log in zip(self._costs(len(scores_MB)), logs, strict=True)
        }
        return super().facts(scores_MB, group_B, lengths_B) | named

    def commit(self, scores_MB: Tensor, group_B: Tensor, lengths_B: Tensor) -> None:
        self._logs, self._recent = self._next(scores_MB)
        self._steps += 1

    def state_dict(self) -> dict[str, Any]:
        return {"log_lambdas": self._logs, "recent_costs": self._recent, "steps": self._steps}

    def restore(self, state: Mapping[str, Any]) -> None:
        self._logs = [float(x) for x in state["log_lambdas"]]
        self._recent = [[float(x) for x in costs] for costs in state["recent_costs"]]
        self._steps = int(state["steps"])

    def _costs(self, count: int) -> list[int]:
        return self._at or [count - 1]

    def _next(self, scores_MB: Tensor) -> tuple[list[float], list[list[float]]]:
        """Every ``l`` and the costs in its window, this batch included."""
        at = self._costs(len(scores_MB))
        logs = self._logs or [math.log(self.lambda_init)] * len(at)
        before = self._recent or [[] for _ in at]
        costs = (-scores_MB[at].double()).tolist()
        recent = [(old + new)[-self.window :] for old, new in zip(before, costs, strict=True)]
        if self._steps < self.delay_steps:
            return logs, recent
        changed = [
            log + self.lambda_lr * math.exp(log) * (sum(window) / len(window) - self.threshold)
            for log, window in zip(logs, recent, strict=True)
        ]
        return [min(log, math.log(self.lambda_max)) for log in changed], recent
