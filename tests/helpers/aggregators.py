"""Aggregators with memory, one for the host and one for a device, and a record of what any one was told."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from gapo_mega.aggregation.base import Aggregator, TensorSolution
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.aggregation.on_host import HostMethod, Solution
from gapo_mega.ops import Aggregated, AggregationMethod


@dataclass(kw_only=True, eq=False)
class Remembering(Aggregator):
    """``w_i = 1 / n_i``, ``n_i^2`` the sum of the squared norms of this step and half of those before."""

    before: Tensor | None = field(default=None, init=False)  # [M], where the Gram matrices are

    def squares(self, diagonal: Tensor) -> Tensor:
        return diagonal if self.before is None else diagonal + 0.5 * self.before

    def commit(self, found: Aggregated) -> None:
        self.before = self.squares(found.gram.diagonal()).clone()

    def state_dict(self) -> dict[str, Any]:
        return {} if self.before is None else {"before": self.before.tolist()}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.before = torch.tensor(state["before"], dtype=torch.float64) if state else None


class OnHost(Remembering, HostMethod):
    name: ClassVar[str] = "remembering_on_host"

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        whole = torch.zeros(max(active) + 1 if self.before is None else len(self.before)).double()
        whole[list(active)] = gram.diagonal()
        return Solution(self.squares(whole)[list(active)].rsqrt())


class OnDevice(Remembering, DeviceMethod):
    name: ClassVar[str] = "remembering_on_device"

    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        squares = self.squares(torch.where(active, gram.diagonal(), 1.0))
        status = torch.zeros(1, dtype=torch.int32, device=gram.device)
        return TensorSolution(torch.where(active, squares.rsqrt(), 0.0), gram.new_zeros(()), status)


class Recorded(AggregationMethod):
    """A method, the answers that it gave, and those that it was told of."""

    def __init__(self, method: AggregationMethod) -> None:
        self.method = method
        self.answers: list[Aggregated] = []
        self.committed: list[Aggregated] = []

    def weigh(self, gram: Tensor) -> Aggregated:
        self.answers.append(self.method.weigh(gram))
        return self.answers[-1]

    def error(self, found: Aggregated) -> ValueError:
        return self.method.error(found)

    def commit(self, found: Aggregated) -> None:
        self.committed.append(found)
        self.method.commit(found)
