"""The contract of a method that finds weights from a Gram matrix, and a plain function as a method."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from gapo_mega.ops.api import Status

# What combine_ multiplies the rows by.
_LIMITS = torch.finfo(torch.float32)
# Norms that rows of fp32 can have, up to 2^40 elements of them.
_SHORTEST, _LONGEST = 2.0**-149, 2.0**148

# gram [M, M] float64 on the CPU -> weights [M] float64; raises if it finds none.
HostAggregator = Callable[[Tensor], Tensor]


@dataclass(frozen=True, eq=False)  # tensors have no one truth to compare by
class Aggregated:
    """A Gram matrix and its weights on one device; reading them on the host waits for the device.

    An answer is equal to itself only.
    """

    gram: Tensor  # [M, M] float64, over all ranks of the group
    weights: Tensor  # [M] float64; zeros if the status is not OK
    status: Tensor  # [1] int32, a Status
    proposed: Tensor  # [M] float64: the method's weights, whatever the status

    @classmethod
    def of(cls, gram: Tensor, proposed: Tensor, status: Tensor) -> Aggregated:
        """Take ``proposed`` as weights if ``status`` is OK, else zeros, without waiting for the device.

        An OK status becomes OUT_OF_RANGE if the combination in fp32 would not be that of the weights.
        """
        beyond = (status == Status.OK) & ~_fit(gram, proposed)
        status = status.masked_fill(beyond, int(Status.OUT_OF_RANGE))
        weights = torch.where(status == Status.OK, proposed, torch.zeros_like(proposed))
        return cls(gram, weights, status, proposed)

    def ok(self) -> bool:
        """Whether there are weights to combine with; waits for the device."""
        return int(self.status) == Status.OK

    def to(self, device: torch.device) -> Aggregated:
        """The same on ``device``: this very answer where it is there already."""
        parts = (self.gram, self.weights, self.status, self.proposed)
        moved = [part.to(device) for part in parts]
        here = all(new is old for new, old in zip(moved, parts, strict=True))
        return self if here else Aggregated(*moved)


def _fit(gram: Tensor, weights: Tensor) -> Tensor:
    """Whether fp32 holds the weights, and the size of their combination; on the device.

    Every weight must round to a normal number, unless its summand vanishes beside the others in fp32 anyway,
    and so must ``sum_i |w_i| ||g_i||``, which bounds every element of the combination and its norm. Vectors
    whose norms no rows of fp32 have are combined by nobody: their weights need only be finite.
    """
    size = weights.abs()
    rounded = size.to(torch.float32)
    norms = gram.diagonal().sqrt()
    summands = size * norms
    total = summands.sum()
    vanishing = summands <= _LIMITS.eps / 2 * total
    each = (rounded <= _LIMITS.max) & ((rounded >= _LIMITS.tiny) | vanishing)
    combined = (total == 0) | ((total >= _LIMITS.tiny) & (total <= _LIMITS.max))
    of_rows = ((norms == 0) | ((norms >= _SHORTEST) & (norms <= _LONGEST))).all()
    return size.isfinite().all() & ((each.all() & combined) | ~of_rows)


def beyond_range(found: Aggregated) -> str:
    """What a method found whose status is OUT_OF_RANGE, in words."""
    gram, weights = found.gram.cpu(), found.proposed.cpu()
    active = gram.diagonal() > 0
    norms = gram.diagonal()[active].sqrt().tolist()
    return (
        f"the weights {weights[active].tolist()} for gradients of norm {norms}, outside the range of float32 "
        f"({_LIMITS.tiny:.2g} to {_LIMITS.max:.2g}), in which gradients are weighted and summed"
    )


class AggregationMethod(ABC):
    """Finds weights and a status for a Gram matrix. Callers ask with ``weigh``, once per step.

    Asking changes nothing: a method updates its memory in ``commit`` only.
    """

    @abstractmethod
    def weigh(self, gram: Tensor) -> Aggregated:
        """Weights and a :class:`Status` for ``gram``, float64 ``[M, M]``, on its device.

        Bad numbers give a status. Raises ``ValueError`` for what the host knows without the device: shapes,
        and options for another number of objectives.
        """

    @abstractmethod
    def error(self, found: Aggregated) -> ValueError:
        """The error that says why ``found``, whose status is not OK, has no weights; waits for the device."""

    @abstractmethod
    def commit(self, found: Aggregated) -> None:
        """Remember ``found``, a result of ``weigh`` with which the optimizer took its step.

        Callers call it once for every step that is not skipped, on every rank with the same numbers.
        """

    def weigh_or_raise(self, gram: Tensor) -> Aggregated:
        """``weigh`` on the CPU; raises ``error`` if there are no weights."""
        found = self.weigh(gram.detach().to("cpu", torch.float64))
        if not found.ok():
            raise self.error(found)
        return found

    def __call__(self, gram: Tensor) -> Tensor:
        """Weights [M] float64 on the CPU for ``gram`` [M, M]; raises ``error`` if there are none."""
        return self.weigh_or_raise(gram).weights


class HostFunction(AggregationMethod):
    """Makes a method of any function of the Gram matrix, which sees finite numbers only and has no memory."""

    def __init__(self, function: HostAggregator) -> None:
        self._function = function

    def weigh(self, gram: Tensor) -> Aggregated:
        """Raises what the function raises, and ``ValueError`` if its weights are not M finite numbers."""
        host = gram.cpu()
        status = Status.OK if bool(host.isfinite().all()) else Status.NOT_FINITE
        weights = self._function(host) if status == Status.OK else host.new_zeros(host.shape[0])
        if weights.shape != (host.shape[0],) or not bool(weights.isfinite().all()):
            raise ValueError(
                f"aggregator: found the weights {weights.tolist()}, accepted: a finite one a row"
            )
        told = torch.tensor([int(status)], dtype=torch.int32, device="cpu")
        return Aggregated.of(host, weights.to("cpu", torch.float64), told).to(gram.device)

    def error(self, found: Aggregated) -> ValueError:
        """A function's statuses besides OK are NOT_FINITE and OUT_OF_RANGE."""
        if int(found.status) == Status.OUT_OF_RANGE:
            return ValueError(f"aggregator: found {beyond_range(found)}")
        return ValueError(f"gram: found {found.gram.tolist()}, accepted: finite numbers")

    def commit(self, found: Aggregated) -> None:
        """Does nothing: a function has no memory."""


def method_of(aggregator: HostAggregator) -> AggregationMethod:
    """``aggregator`` itself if it is a method, else the function as a method."""
    return aggregator if isinstance(aggregator, AggregationMethod) else HostFunction(aggregator)
