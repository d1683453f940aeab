"""The whole path in one call: Gram matrix, sum over ranks, weights, combination in place."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.ops._native import has_cuda
from gapo_mega.ops.api import Status, combine_, gramian
from gapo_mega.ops.arguments import InverseRoot, Row, Segments, parse_out, parse_rows

# gram [M, M] float64 on the CPU -> weights [M] float64; raises what it cannot solve.
HostAggregator = Callable[[Tensor], Tensor]


class DeviceAggregator(ABC):
    """A ``HostAggregator`` that can also find its weights where the Gram matrix lies."""

    @abstractmethod
    def __call__(self, gram: Tensor) -> Tensor:
        """As a ``HostAggregator``."""

    @abstractmethod
    def on_device(self, gram: Tensor) -> tuple[Tensor, Tensor]:
        """Weights float64 ``[M]`` and a :class:`Status` int32 ``[1]`` on the device of ``gram``, float64
        ``[M, M]``, without waiting for it. Where the status is not OK the weights are zero."""


@dataclass(frozen=True)
class Aggregated:
    """What :func:`aggregate_` found, all on the rows' device; reading it on the host waits for the device."""

    gram: Tensor  # [M, M] float64, over all ranks of the group
    weights: Tensor  # [M] float64
    status: Tensor  # [1] int32, a Status

    def ok(self) -> bool:
        """Whether ``out`` holds the combination. Waits for the device."""
        return int(self.status) == Status.OK


def aggregate_(
    out: Row,
    rows: Sequence[Row],
    segments: Segments | None,
    group: dist.ProcessGroup | None,
    aggregator: HostAggregator,
    *,
    weight: Row | InverseRoot | None = None,
) -> Aggregated:
    """Writes ``sum_i w_i rows_i`` to ``out``, ``w`` by ``aggregator`` from the rows' global Gram matrix.

    The Gram matrix of the local pieces is summed over ``group`` (M x M numbers travel, whatever the
    rows' length), becomes weights, and one pass writes the combination. With a
    :class:`DeviceAggregator` nothing waits for the device after the first call with these lengths,
    segments and options, and the whole can be captured in a CUDA graph; with any other callable, or
    without the compiled CUDA back end, the Gram matrix visits the host.

    Args:
        out: shaped like a row; memory of its own or exactly one of the rows.
        rows: M rows as for :func:`gapo_mega.ops.gramian`: this rank's own part of every gradient.
        segments: the ranges of the rows that count in inner products; the combination is written for
            every element.
        group: the ranks whose rows are different parts of the same gradients (the same M everywhere);
            None where the rows are whole.
        aggregator: a method of ``gapo_mega.aggregation``, or any function of the Gram matrix.
        weight: for inner products in a diagonal metric, as for :func:`gapo_mega.ops.gramian`.

    Returns:
        Gram matrix, weights and status. Where the status is not OK (a NaN or Inf in some row, say), the
        weights are zero and ``out`` is filled with zeros.

    Raises:
        ValueError: arguments as for ``gramian`` and ``combine_``, before anything is sent (so a rank that
            errs alone leaves the others waiting); whatever a host aggregator raises, and its weights
            where they are not M finite numbers, on every rank alike. ``out`` is then untouched.
    """
    parse_out(out, parse_rows("rows", rows))
    gram = gramian(rows, segments=segments, weight=weight)
    if group is not None:
        sum_gram_(gram, group)
    weights, status = solve(gram, aggregator)
    combine_(out, rows, weights)
    return Aggregated(gram, weights, status)


def sum_gram_(gram: Tensor, group: dist.ProcessGroup) -> Tensor:
    """``gram`` [M, M], symmetric, summed over ``group`` in place: M (M + 1) / 2 doubles travel."""
    rows, columns = _triangle(gram.shape[0], gram.device)
    packed = gram[rows, columns]
    dist.all_reduce(packed, group=group)
    gram[rows, columns] = packed
    gram[columns, rows] = packed
    return gram


@cache
def _triangle(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Kept for good, as a captured CUDA graph goes on reading it.
    rows, columns = torch.triu_indices(count, count, device=device)
    return rows, columns


def solve(gram: Tensor, aggregator: HostAggregator) -> tuple[Tensor, Tensor]:
    """Weights float64 ``[M]`` and :class:`Status` int32 ``[1]`` on the device of ``gram`` [M, M].

    A :class:`DeviceAggregator` finds them there without waiting, any other callable on the host. Where the
    status is not OK the weights are zero. Raises what a host aggregator raises, and ``ValueError`` where
    its weights are not M finite numbers.
    """
    if isinstance(aggregator, DeviceAggregator) and (gram.device.type == "cpu" or has_cuda):
        return aggregator.on_device(gram)
    return _on_host(gram, aggregator)


def _on_host(gram: Tensor, aggregator: HostAggregator) -> tuple[Tensor, Tensor]:
    host = gram.cpu()
    status = Status.OK if bool(host.isfinite().all()) else Status.NOT_FINITE
    weights = aggregator(host) if status == Status.OK else host.new_zeros(host.shape[0])
    if weights.shape != (host.shape[0],) or not bool(weights.isfinite().all()):
        raise ValueError(f"aggregator: found the weights {weights.tolist()}, accepted: a finite one a row")
    told = torch.tensor([int(status)], dtype=torch.int32, device=gram.device)
    return weights.to(gram.device, torch.float64), told
