"""The whole path in one call: Gram matrix, all-reduce, weights, combination in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.ops.api import combine_, gramian
from gapo_mega.ops.arguments import InverseRoot, Row, Segments, parse_out, parse_rows
from gapo_mega.ops.compiling import never_compiled
from gapo_mega.ops.constants import resident
from gapo_mega.ops.kernels import usable
from gapo_mega.ops.method import Aggregated, HostAggregator, method_of


@never_compiled
def aggregate_(
    out: Row,
    rows: Sequence[Row],
    segments: Segments | None,
    group: dist.ProcessGroup | None,
    aggregator: HostAggregator,
    *,
    weight: Row | InverseRoot | None = None,
) -> Aggregated:
    """Write ``sum_i w_i rows_i`` to ``out``, with ``w`` from ``aggregator`` and the rows' global Gram matrix.

    An all-reduce over ``group`` sums the ranks' Gram matrices (M (M + 1) / 2 numbers, for rows of any
    length), the aggregator turns the sum into weights, and one pass writes the combination. With a method
    that runs on the device (``aggregation.on_device.DeviceMethod``) nothing waits for the device after the
    first call with these lengths, segments and options, and a CUDA graph can capture the whole call. With any
    other callable, or where the compiled kernels do not run, the Gram matrix visits the host.

    For a method with memory, call :meth:`AggregationMethod.commit` with the returned value after the step.

    Args:
        out: shaped like a row; memory of its own or exactly one of the rows.
        rows: M rows as for :func:`gapo_mega.ops.gramian`: this rank's own part of every gradient.
        segments: the ranges of the rows that count in inner products. The combination covers every element.
        group: the ranks whose rows are different parts of the same gradients (the same M everywhere);
            None if the rows are whole.
        aggregator: a method of ``gapo_mega.aggregation``, or any function of the Gram matrix.
        weight: for inner products in a diagonal metric, as for :func:`gapo_mega.ops.gramian`.

    Returns:
        Gram matrix, weights and status. If the status is not OK (a NaN or Inf in some row, say), the weights
        and ``out`` are zero.

    Raises:
        ValueError: bad arguments, as for ``gramian`` and ``combine_``, before any communication (so a rank
            that errs alone leaves the others waiting). Also, on every rank alike, whatever a plain function
            raises, or if its weights are not M finite numbers. ``out`` is then untouched.
    """
    parse_out(out, parse_rows("rows", rows))
    gram = gramian(rows, segments=segments, weight=weight)
    if group is not None:
        sum_gram_(gram, group)
    found = solve(gram, aggregator)
    combine_(out, rows, found.weights)
    return found


@never_compiled
def sum_gram_(gram: Tensor, group: dist.ProcessGroup) -> Tensor:
    """All-reduce the symmetric ``gram`` [M, M] over ``group`` in place, as M (M + 1) / 2 doubles."""
    rows, columns = _triangle(gram.shape[0], gram.device)
    packed = gram[rows, columns]
    dist.all_reduce(packed, group=group)
    gram[rows, columns] = packed
    gram[columns, rows] = packed
    return gram


@cache
def _triangle(count: int, device: torch.device) -> tuple[Tensor, Tensor]:
    # Never freed, because a captured CUDA graph keeps reading it.
    rows, columns = resident(torch.triu_indices(count, count, device="cpu"), device)
    return rows, columns


@never_compiled
def solve(gram: Tensor, aggregator: HostAggregator) -> Aggregated:
    """Ask ``aggregator`` for weights, once; a step asks nowhere else.

    ``gram`` is float64 ``[M, M]``, and the result lies on its device. A method that runs on the device waits
    for nothing; any other visits the host. If the status is not OK the weights are zero, and
    :meth:`AggregationMethod.error` says why in words. Raises what a plain function raises, and ``ValueError``
    if its weights are not M finite numbers.
    """
    on_device = gram.device.type == "cpu" or usable(gram.device)
    return method_of(aggregator).weigh(gram if on_device else gram.cpu()).to(gram.device)
