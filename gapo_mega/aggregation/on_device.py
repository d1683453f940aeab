"""Methods whose weights can stay where the Gram matrix is: one formula for the host and for a device."""

from __future__ import annotations

from abc import abstractmethod
from functools import cache

import torch
from torch import Tensor

from gapo_mega.aggregation.base import Aggregator, TensorSolution
from gapo_mega.ops.constants import resident


class DeviceMethod(Aggregator):
    """An ``Aggregator`` that gives its formula in tensor operations that never wait for the device.

    A CUDA graph can capture it. A method with memory keeps it in tensors on the device of the Gram
    matrices that ``commit`` receives.
    """

    @abstractmethod
    def formula(self, gram: Tensor, active: Tensor, numbers: Tensor | None) -> TensorSolution:
        """Apply the method's formula without reading a value on the host.

        ``gram`` [M, M] float64 has a positive diagonal where ``active`` [M] is true and rows and columns of
        zeros elsewhere; ``numbers`` [M] is the method's option with one number per objective, None where
        it is left out. Nobody has checked ``gram`` yet: the caller discards the result for an invalid
        matrix, so this must not raise.
        """

    def solution(self, gram: Tensor, active: Tensor) -> TensorSolution:
        options = list(self.per_objective().values())
        assert len(options) <= 1, "a method with several such options needs names for them here"
        numbers = _constant(tuple(map(float, options[0])), gram.device) if options else None
        return self.formula(gram, active, numbers)


@cache
def _constant(numbers: tuple[float, ...], device: torch.device) -> Tensor:
    # Kept for good: it reaches the device once, and a captured CUDA graph goes on reading it there.
    return resident(torch.tensor(numbers, dtype=torch.float64, device="cpu"), device)
