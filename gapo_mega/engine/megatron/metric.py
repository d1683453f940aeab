"""Inner products of rows of a shard, euclidean or in Adam's own metric."""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from gapo_mega import ops
from gapo_mega.engine.megatron.cpu import device
from gapo_mega.engine.megatron.optimizer_state import main_parameters, steps_taken
from gapo_mega.engine.megatron.shard import GradientShard, Placement, Span, chunk_elements, chunks

Row = Sequence[Tensor]


class AdamMetric:
    """``D = 1 / (sqrt(v) + eps)`` at every element, v the bias-corrected second moment after the last step.

    A step of Adam with beta1 = 0 and without weight decay or clipping changes the parameters by -lr D' d for
    the direction d, where D' differs from D by the step's own contribution to v. With weights that suit
    the inner products <a, D b>, no objective is hurt to first order by -D d.

    Before the first step all of v is 0 and D is 1: the metric is euclidean. Later, elements whose v is 0
    have never had a gradient; D is 0 there, they do not count (1 / eps would let the first gradient in
    such a place outweigh all others).
    """

    def __init__(self, optimizer: MegatronOptimizer, shard: GradientShard) -> None:
        """The metric as the optimizer's state is now."""
        (inner,) = optimizer.chained_optimizers
        self._placements = sorted(shard.placements, key=lambda placement: placement.start)
        self._steps = steps_taken(inner.optimizer)
        config = inner.config
        self._eps = config.adam_eps
        self._correction = 1.0 - math.pow(config.adam_beta2, self._steps) if self._steps else 1.0
        self._held: dict[torch.nn.Parameter, tuple[int, Tensor]] = {}
        if self._steps:
            for parameter, main, start, _ in main_parameters(inner):
                second = inner.optimizer.state[main]["exp_avg_sq"]
                self._held[parameter] = start, second.detach().reshape(-1)

    @property
    def is_euclidean(self) -> bool:
        """Whether D is 1 everywhere."""
        return self._steps == 0

    def factors(self, start: int, end: int) -> Tensor:
        """D at positions ``[start, end)`` of the shard, float32; 0 between parameters."""
        result = torch.zeros(end - start, device=device())
        first = bisect_right(self._placements, start, key=lambda placement: placement.end)
        last = bisect_left(self._placements, end, key=lambda placement: placement.start)
        for placement in self._placements[first:last]:
            low, high = max(start, placement.start), min(end, placement.end)
            second = self._second_moment(placement, low, high)
            factors = 1.0 / ((second / self._correction).sqrt_() + self._eps)
            result[low - start : high - start] = torch.where(second > 0, factors, 0.0)
        return result

    def _second_moment(self, placement: Placement, low: int, high: int) -> Tensor:
        first, values = self._held[placement.parameter]
        shift = placement.first - placement.start - first
        return values[low + shift : high + shift]


def inner_products(shard: GradientShard, rows: Sequence[Row], metric: AdamMetric | None = None) -> Tensor:
    """This rank's part of the Gram matrix of ``rows`` [M, M] float64; zeros where the shard is empty.

    Rows may differ in type; those that are not fp32 are copied chunk by chunk.
    """
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device())
    euclidean = metric is None or metric.is_euclidean
    if euclidean and len({row[0].dtype for row in rows if row}) == 1:
        return ops.gramian(rows, segments=shard.segments, out=gram)
    for piece, start, end, position in chunks([p.numel() for p in shard.pieces], chunk_elements()):
        stop = position + end - start
        ops.gramian(
            [row[piece][start:end].float() for row in rows],
            segments=_within(shard.segments, (position, stop)),
            weight=None if euclidean else metric.factors(position, stop),  # type: ignore[union-attr]
            out=gram,
        )
    return gram


def combine_rows_(out: Row, rows: Sequence[Row], weights: Tensor) -> None:
    """``sum_i weights_i rows_i`` to ``out``, fp32, which is one of the rows; the others may be bf16."""
    if len({row[0].dtype for row in rows if row}) <= 1:
        ops.combine_(out, rows, weights)
        return
    for piece, start, end, _ in chunks([p.numel() for p in out], chunk_elements()):
        ops.combine_(out[piece][start:end], [row[piece][start:end].float() for row in rows], weights)


def _within(segments: Sequence[Span], limits: Span) -> list[Span]:
    """The parts of sorted ``segments`` within ``limits``, from their beginning."""
    low, high = limits
    first = bisect_right(segments, low, key=lambda segment: segment[1])
    last = bisect_left(segments, high, key=lambda segment: segment[0])
    return [(max(start, low) - low, min(end, high) - low) for start, end in segments[first:last]]
