"""Inner products of rows of a shard, euclidean or in Adam's own metric."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from megatron.core.optimizer import MegatronOptimizer
from torch import Tensor

from gapo_mega import ops
from gapo_mega.engine.megatron.gradients.shard import Counted, GradientShard, Placement
from gapo_mega.engine.megatron.model.main_parameters import main_parameters, steps_taken
from gapo_mega.engine.megatron.runtime.cpu import device

Row = Sequence[Tensor]

MOST_ROWS = 16  # per call of the Gram kernel


class AdamMetric:
    """``D = 1 / (sqrt(v) + eps)`` at every element, v the bias-corrected second moment after the last step.

    A step of Adam with beta1 = 0 and without weight decay or clipping changes the parameters by -lr D' d for
    the direction d. D' differs from D by the step's own contribution to v. Weights found from the inner
    products <a, D b> make -D d harm no objective to first order.

    Before the first step all of v is 0, and the metric is euclidean: D is 1. Later, elements whose v is 0
    have never had a gradient. D is 0 there, so they do not count: 1 / eps would let the first gradient of
    such an element outweigh all others.
    """

    def __init__(self, optimizer: MegatronOptimizer) -> None:
        """Take the metric from the optimizer's current state."""
        optimizers = optimizer.chained_optimizers
        (self._steps,) = {steps_taken(inner.optimizer) for inner in optimizers}
        config = optimizers[0].config
        self._eps = config.adam_eps
        self._correction = 1.0 - math.pow(config.adam_beta2, self._steps) if self._steps else 1.0
        self._held: dict[torch.nn.Parameter, tuple[int, Tensor]] = {}
        if self._steps:
            for inner in optimizers:
                for parameter, main, start, _ in main_parameters(inner):
                    second = inner.optimizer.state[main]["exp_avg_sq"]
                    self._held[parameter] = start, second.detach().reshape(-1)

    @property
    def is_euclidean(self) -> bool:
        """Whether D is 1 everywhere."""
        return self._steps == 0

    def factors(self, placements: Sequence[Placement]) -> ops.InverseRoot:
        """D over ``placements``, one piece each, as views of the optimizer's state."""
        pieces = []
        for placement in placements:
            begin, values = self._held[placement.parameter]
            pieces.append(placement.part_of(values, begin))
        return ops.InverseRoot(pieces, self._correction, self._eps)


def inner_products(
    shard: GradientShard,
    rows: Sequence[Row],
    metric: AdamMetric | None = None,
    counted: Counted | None = None,
) -> Tensor:
    """This rank's part of the Gram matrix of ``rows`` [M, M] float64; zeros if nothing counts.

    ``counted``: an entry of ``shard.counted``; none: its first.
    """
    counted = shard.counted[0] if counted is None else counted
    gram = torch.zeros(len(rows), len(rows), dtype=torch.float64, device=device())
    if not counted.placements:
        return gram
    if len(rows) > MOST_ROWS:
        for chosen in _pairs_of_blocks(len(rows)):
            part = inner_products(shard, [rows[i] for i in chosen], metric, counted)
            index = torch.tensor(chosen, device=gram.device)
            gram[index[:, None], index] = part
        return gram
    if metric is None or metric.is_euclidean:
        return ops.gramian(rows, segments=counted.segments, out=gram)
    parts = [[shard.view(row, placement) for placement in counted.placements] for row in rows]
    return ops.gramian(parts, weight=metric.factors(counted.placements), out=gram)


def _pairs_of_blocks(count: int) -> list[list[int]]:
    """Sets of at most ``MOST_ROWS`` of ``count`` rows, more than that, in which every two rows meet."""
    half = MOST_ROWS // 2
    blocks = [list(range(start, min(start + half, count))) for start in range(0, count, half)]
    return [one + other for one, other in combinations(blocks, 2)]
