"""The whole path in one call: Gram matrix, sum over ranks, weights, combination in place."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.ops._native import has_cuda
from gapo_mega.ops.api import combine_, gramian
from gapo_mega.ops.arguments import InverseRoot, Row, Segments, parse_out, parse_rows
from gapo_mega.ops.method import Aggregated, HostAggregator, method_of


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
    rows' length), becomes weights, and one pass writes the combination. With a method that has a form for
    the device (``aggregation.on_device.DeviceMethod``) nothing waits for the device after the first call
    with these lengths, segments and options, and the whole can be captured in a CUDA graph; with any other
    callable, or without the compiled CUDA back end, the Gram matrix visits the host.

    A method with memory keeps what :meth:`AggregationMethod.commit` tells it; call it with what is returned
    once the step is taken.

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
            errs alone leaves the others waiting); whatever a plain function raises, and its weights
            where they are not M finite numbers, on every rank alike. ``out`` is then untouched.
    """
    parse_out(out, parse_rows("rows", rows))
    gram = gramian(rows, segments=segments, weight=weight)
    if group is not None:
        sum_gram_(gram, group)
    found = solve(gram, aggregator)
    combine_(out, rows, found.weights)
    return found


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


def solve(gram: Tensor, aggregator: HostAggregator) -> Aggregated:
    """Asks ``aggregator`` for weights, once: the only place where a step does so.

    ``gram`` is float64 ``[M, M]``; what is found lies on its device. A method that has a form for the device
    waits for nothing, any other visits the host. Where the status is not OK the weights are zero, and
    :meth:`AggregationMethod.error` says why in words. Raises what a plain function raises, and
    ``ValueError`` where its weights are not M finite numbers.
    """
    on_device = gram.device.type == "cpu" or has_cuda
    return method_of(aggregator).weigh(gram if on_device else gram.cpu()).to(gram.device)
