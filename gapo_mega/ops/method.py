"""What finds weights from a Gram matrix: the contract of a method, and any function in its place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.ops.api import Status

# gram [M, M] float64 on the CPU -> weights [M] float64; raises what it cannot solve.
HostAggregator = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Aggregated:
    """A Gram matrix and the weights found for it, on one device; reading it on the host waits for it."""

    gram: Tensor  # [M, M] float64, over all ranks of the group
    weights: Tensor  # [M] float64; zeros where the status is not OK
    status: Tensor  # [1] int32, a Status
    proposed: Tensor  # [M] float64: the weights as the method gave them, whatever the status

    @classmethod
    def of(cls, gram: Tensor, proposed: Tensor, status: Tensor) -> Aggregated:
        """With ``proposed`` as the weights where ``status`` is OK, else zeros; waits for nothing."""
        weights = torch.where(status == Status.OK, proposed, torch.zeros_like(proposed))
        return cls(gram, weights, status, proposed)

    def ok(self) -> bool:
        """Whether there are weights to combine with. Waits for the device."""
        return int(self.status) == Status.OK

    def to(self, device: torch.device) -> Aggregated:
        """The same on ``device``."""
        parts = (self.gram, self.weights, self.status, self.proposed)
        return Aggregated(*(part.to(device) for part in parts))


class AggregationMethod(ABC):
    """Weights and a status for a Gram matrix. Every caller asks by ``weigh``, once a step.

    Asking changes nothing: what a method remembers from step to step it takes from ``commit``.
    """

    @abstractmethod
    def weigh(self, gram: Tensor) -> Aggregated:
        """Weights and a :class:`Status` for ``gram``, float64 ``[M, M]``, on its device.

        What is wrong with the numbers is a status. Raises ``ValueError`` for what the host knows: shapes, and
        options of another number of objectives.
        """

    @abstractmethod
    def error(self, found: Aggregated) -> ValueError:
        """In words, why ``found``, whose status is not OK, has no weights. Waits for the device."""

    @abstractmethod
    def commit(self, found: Aggregated) -> None:
        """``found``, as ``weigh`` gave it, was combined, and the optimizer took the step.

        Called once for every step that is not skipped, on every rank with the same numbers.
        """

    def weigh_or_raise(self, gram: Tensor) -> Aggregated:
        """As ``weigh``, on the CPU; raises ``error`` where there are no weights."""
        found = self.weigh(gram.detach().to("cpu", torch.float64))
        if not found.ok():
            raise self.error(found)
        return found

    def __call__(self, gram: Tensor) -> Tensor:
        """Weights [M] float64 on the CPU for ``gram`` [M, M]. Raises ``error`` where there are none."""
        return self.weigh_or_raise(gram).weights


class HostFunction(AggregationMethod):
    """Any function of the Gram matrix: it has no memory, sees finite numbers only, raises its own errors."""

    def __init__(self, function: HostAggregator) -> None:
        self._function = function

    def weigh(self, gram: Tensor) -> Aggregated:
        """Raises what the function raises, and ``ValueError`` where its weights are not M finite numbers."""
        host = gram.cpu()
        status = Status.OK if bool(host.isfinite().all()) else Status.NOT_FINITE
        weights = self._function(host) if status == Status.OK else host.new_zeros(host.shape[0])
        if weights.shape != (host.shape[0],) or not bool(weights.isfinite().all()):
            raise ValueError(
                f"aggregator: found the weights {weights.tolist()}, accepted: a finite one a row"
            )
        told = torch.tensor([int(status)], dtype=torch.int32)
        return Aggregated.of(host, weights.to("cpu", torch.float64), told).to(gram.device)

    def error(self, found: Aggregated) -> ValueError:
        """NOT_FINITE is the only status that a function can have but OK."""
        return ValueError(f"gram: found {found.gram.tolist()}, accepted: finite numbers")

    def commit(self, found: Aggregated) -> None:
        """There is nothing to remember."""


def method_of(aggregator: HostAggregator) -> AggregationMethod:
    """``aggregator`` itself where it is a method, else the function as one."""
    return aggregator if isinstance(aggregator, AggregationMethod) else HostFunction(aggregator)
