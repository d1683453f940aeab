"""Methods whose weights can stay where the Gram matrix is: one formula for the host and for a device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor

from gapo_mega.aggregation.base import Aggregator, Solution, scaled_weights
from gapo_mega.ops import DeviceAggregator, Status


@dataclass(frozen=True)
class DeviceSolution:
    """As ``Solution``, in tensors on one device; ``weights`` [M] are 0 where an objective takes no part."""

    weights: Tensor  # [M] float64
    log_factor: Tensor  # [] float64
    status: Tensor  # [1] int32, a Status


class DeviceMethod(Aggregator, DeviceAggregator):
    """An ``Aggregator`` that gives its formula in tensor operations which never wait for the device.

    Called with a Gram matrix it works on the CPU and raises, as every aggregator; ``on_device`` stays on the
    device of the matrix, can be captured in a CUDA graph, and has a status in place of errors.
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
        assert int(solution.status) == Status.OK, "the Gram matrix was checked"
        return Solution(solution.weights, float(solution.log_factor))

    def on_device(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float64 [M] and status int32 [1] on the device of ``gram``; see ``ops.DeviceAggregator``.

        Raises ``ValueError`` for options of another number of objectives.
        """
        count = gram.shape[0]
        self._check_lengths(count)
        diagonal = gram.diagonal()
        active = diagonal > 0
        solution = self.formula(gram, active, self._numbers(range(count), gram.device))
        scaled = scaled_weights(
            self.scale, solution.weights, solution.log_factor, diagonal.sqrt(), active.sum()
        )
        nothing = ~solution.weights.any()
        in_range = (scaled.isfinite().all() & scaled.any()) | nothing
        # Of several reasons the first one here is told.
        reasons = [
            (~gram.isfinite().all(), Status.NOT_FINITE),
            ((diagonal < 0).any(), Status.NEGATIVE_DIAGONAL),
            (~in_range, Status.OUT_OF_RANGE),
        ]
        if self.zero_gradient == "stop":
            reasons.insert(2, ((~active).any(), Status.ZERO_GRADIENT))
        status = solution.status.clone()
        for holds, reason in reversed(reasons):
            status.masked_fill_(holds, int(reason))
        return torch.where(nothing | (status != Status.OK), torch.zeros_like(scaled), scaled), status

    def _numbers(self, active: Sequence[int], device: torch.device) -> Tensor | None:
        options = list(self.per_objective().values())
        assert len(options) <= 1, "a method with several such options needs names for them here"
        return _constant(tuple(float(options[0][i]) for i in active), device) if options else None


@cache
def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept for good: it reaches the device once, and a captured CUDA graph goes on reading it there.
    return torch.tensor(numbers, dtype=torch.float64, device=device)
