"""The combination nearest to a given one that hurts no objective."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gapo_mega.aggregation.base import TensorSolution
from gapo_mega.aggregation.canonical import Problem, in_canonical_order
from gapo_mega.aggregation.on_device import DeviceMethod
from gapo_mega.aggregation.on_host import Solution
from gapo_mega.aggregation.quadratic import increments
from gapo_mega.ops import Status
from gapo_mega.option_checks import require_bool


def safe_weights(gram: Tensor, weights: Tensor) -> Tensor:
    """``w = argmin v' G v subject to v >= weights``, float64 [M] on the CPU.

    ``d = sum_i w_i g_i`` is the projection of ``sum_i weights_i g_i`` onto the dual cone of the gradients: of
    all directions with ``<d, g_i> >= 0`` for every i it is the nearest one. Where the given combination hurts
    nobody it stays as it is.

    ``gram`` [M, M] is finite; zero gradients keep their ``weights`` [M], of any sign and size.
    """
    gram, weights = (tensor.detach().to("cpu", torch.float64) for tensor in (gram, weights))
    active = (gram.diagonal() > 0).nonzero().flatten()
    safe = weights.clone()
    if len(active):
        safe[active] = in_canonical_order(gram[active][:, active], weights[active], nearest).weights
    return safe


def nearest(problem: Problem) -> Solution:
    """``safe_weights`` of a ``Problem`` whose numbers are the given weights."""
    # A power of two keeps the products in range and changes no digit.
    exponent = torch.frexp(problem.numbers.abs().max()).exponent
    given = torch.ldexp(problem.numbers, -exponent)
    raised = increments(problem.cosines, given * problem.norms) / problem.norms
    return Solution(torch.ldexp(given + raised, exponent))


@dataclass(kw_only=True)
class SafeMethod(DeviceMethod):
    """A method that gives weights to start from, whatever conflicts there are.

    ``safe``: true makes of these weights ``argmin v' G v subject to v >= w``: of all directions that hurt no
    objective to first order, the nearest one. That is computed on the host.
    """

    safe: bool = False

    def __post_init__(self) -> None:
        super().__post_init__()
        require_bool("safe", self.safe)

    def solution(self, gram: Tensor, active: Tensor) -> TensorSolution:
        found = super().solution(gram, active)
        if not self.safe or int(self._fault(gram)) != Status.OK:
            return found
        return replace(found, weights=safe_weights(gram, found.weights).to(gram.device))
