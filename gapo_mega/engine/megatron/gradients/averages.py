"""Running means of the objectives' gradients, from whose inner products weights can be found.

The noise of a minibatch inflates every squared norm and hides the angles between gradients. A running mean of
*rows* loses most of it; a running mean of Gram matrices keeps it, because the noise's own square does not
average out.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from gapo_mega import ops
from gapo_mega.aggregation.averaging import averaged_grams
from gapo_mega.engine.megatron.gradients.shard import GradientShard


class AveragedRows:
    """``M_k = beta M_k + (1 - beta) g_k`` over the updates that the optimizer took, on this rank's shard.

    As Adam's first moment, the mean counts as ``M_k / (1 - beta^t)`` after t updates.

    Attributes:
        rows: ``M_k``, one for each objective, shaped like the shard.
        updates: t.
        begun: calls of ``add`` in this process, the one under way included.
    """

    def __init__(self, shard: GradientShard, count: int, beta: float, dtype: torch.dtype) -> None:
        self._shard = shard
        self._beta = beta
        self.rows = [shard.zero_row(count + 1 + index, dtype) for index in range(count)]
        self.updates = 0
        self.begun = 0

    def grams(self, products: Tensor) -> tuple[Tensor, Tensor]:
        """The Gram matrices of the gradients g, and of the means as they will be with g, [M, M] each.

        ``products``: inner products of ``[*rows, *g]``, [2 M, 2 M] float64. Nothing is written: a step may
        yet turn out not to be taken.
        """
        return averaged_grams(products, self._beta, self.updates)

    def add(self, gradients: Sequence[Sequence[Tensor]]) -> None:
        """Add the gradients of an update to the means."""
        self.begun += 1
        for mean, gradient in zip(self.rows, gradients, strict=True):
            ops.combine_(mean, [mean, gradient], [self._beta, 1 - self._beta])
        self.updates += 1

    @property
    def names(self) -> list[str]:
        """Of the means, in their order."""
        return [f"average.{index}" for index in range(len(self.rows))]

    def by_parameter(self) -> dict[nn.Parameter, dict[str, Tensor]]:
        """This rank's part of the means at every parameter, by ``names``, as flat views."""
        return {
            placement.parameter: {
                name: self._shard.view(row, placement)
                for name, row in zip(self.names, self.rows, strict=True)
            }
            for placement in self._shard.placements
        }
