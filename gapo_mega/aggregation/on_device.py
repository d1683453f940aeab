"""Methods whose weights can stay where the Gram matrix is: one formula for the host and for a device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gapo_mega.aggregation.base import Aggregator, Solution
from gapo_mega.ops import Aggregated, Status


@dataclass(frozen=True)
class DeviceSolution:
    """As ``Solution``, in tensors on one device; ``weights`` [M] are 0 where an objective takes no part."""

    weights: Tensor  # [M] float64
    log_factor: Tensor  # [] float64
    status: Tensor  # [1] int32, a Status


class DeviceMethod(Aggregator):
    """An ``Aggregator`` that gives its formula in tensor operations which never wait for the device.

    On the CPU it works as every aggregator does, on the objectives that take part. ``on_device`` stays on the
    device of the matrix and can be captured in a CUDA graph; a method with memory keeps it in tensors there.
    """

    @abstractmethod
    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> DeviceSolution:
        """The method's formula, without reading a value on the host.

        ``gram`` [M, M] float64 has a positive diagonal where ``active`` [M] is true and rows and columns of
        zeros elsewhere; ``numbers`` [M] is the method's option with one number per objective, None where
        it is left out. On a device ``gram`` may hold anything, as nobody has looked: what comes out where
        it is no Gram matrix is not used, but nothing may be raised.
        """

    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        """The formula on the host, for the objectives that take part."""
        solution = self.formula(gram, gram.diagonal() > 0, self._numbers(active, gram.device))
        return Solution(solution.weights, float(solution.log_factor), Status(int(solution.status)))

    def weigh(self, gram: Tensor) -> Aggregated:
        """See ``AggregationMethod.weigh``."""
        return super().weigh(gram) if gram.device.type == "cpu" else self.on_device(gram)

    def on_device(self, gram: Tensor) -> Aggregated:
        """As ``weigh``, by the form for a device, which works on any, the CPU too, and waits for none."""
        self._check(gram)
        diagonal = gram.diagonal()
        active = diagonal > 0
        solution = self.formula(gram, active, self._numbers(range(len(gram)), gram.device))
        proposed, status = self._scaled(
            solution.weights, solution.log_factor, solution.status, diagonal.sqrt(), active.sum()
        )
        fault = self._fault(gram)
        return Aggregated.of(gram, proposed, torch.where(fault != Status.OK, fault, status))

    def _numbers(self, active: Sequence[int], device: torch.device) -> Tensor | None:
        options = list(self.per_objective().values())
        assert len(options) <= 1, "a method with several such options needs names for them here"
        return _constant(tuple(float(options[0][i]) for i in active), device) if options else None


@cache
def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept for good: it reaches the device once, and a captured CUDA graph goes on reading it there.
    return torch.tensor(numbers, dtype=torch.float64, device=device)
