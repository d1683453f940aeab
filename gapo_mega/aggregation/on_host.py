"""Methods that are plain arithmetic on the host: the Gram matrix is copied there from any device."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.aggregation.base import Aggregator, TensorSolution
from gapo_mega.ops import Status


@dataclass(frozen=True)
class Solution:
    """Weights ``weights * exp(log_factor)`` over the objectives that take part; see ``TensorSolution``."""

    weights: Tensor  # [K] float64
    log_factor: float = 0.0
    status: Status = Status.OK  # NOT_CONVERGED where the formula found none


class HostMethod(Aggregator):
    """An ``Aggregator`` whose formula sees only the objectives that take part, on the CPU."""

    @abstractmethod
    def solve(self, gram: Tensor, active: Sequence[int]) -> Solution:
        """Apply the method's formula. Reads what the method remembers, and changes nothing.

        ``gram`` is float64 [K, K], finite, with a positive diagonal, and belongs to the objectives
        ``active`` (K ascending indices), by which methods with one number per objective pick theirs.
        """

    def solution(self, gram: Tensor, active: Tensor) -> TensorSolution:
        """Call ``solve`` on the host where there is something to combine."""
        host = gram.cpu()
        taking_part = active.cpu().nonzero().flatten()
        weights = torch.zeros(len(host), dtype=torch.float64, device="cpu")
        solved = Solution(weights)
        if int(self._fault(host)) == Status.OK and len(taking_part):
            solved = self.solve(host[taking_part][:, taking_part], taking_part.tolist())
            weights[taking_part] = solved.weights
        log_factor = torch.tensor(solved.log_factor, dtype=torch.float64, device="cpu")
        status = torch.tensor([int(solved.status)], dtype=torch.int32, device="cpu")
        return TensorSolution(*(part.to(gram.device) for part in (weights, log_factor, status)))
