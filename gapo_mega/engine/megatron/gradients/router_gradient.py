"""The gradient of the routers' losses, which belongs to no objective.

It has passes of its own, before those of the objectives: a forward that counts the choices of experts, and a
forward and backward. It is in no row and has no weight, and is added once to the combined direction.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.engine.megatron.gradients.shard import GradientShard
from gapo_mega.engine.megatron.model.forward import forward_backward, forward_only
from gapo_mega.engine.megatron.model.logprobs import Backwards, Distribution, Wanted
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.model.router_losses import RouterLosses, watched
from gapo_mega.types import Experience


class RouterGradient:
    """The gradient of ``aux`` times the auxiliary loss plus ``z`` times the z loss.

    Attributes:
        row: the gradient, shaped like the shard, float32.
        values: auxiliary and z loss of the whole model, without their factors, after ``measure``; 0 where
            the factor is.
    """

    def __init__(
        self,
        trainable: Trainable,
        shard: GradientShard,
        row: list[Tensor],
        distribution: Distribution,
        chunk: int,
        factors: tuple[float, float],
    ) -> None:
        """``row``: memory for the gradient; ``chunk``: as in ``Wanted``; ``factors``: aux, z."""
        self._trainable, self._shard, self._factors = trainable, shard, factors
        self._wanted = Wanted(distribution, Backwards(last=True), chunk=chunk, tells_routers=True)
        self.row = row
        self.values = (0.0, 0.0)

    def measure(self, microbatches: Sequence[Experience], tokens: float) -> None:
        """Fill ``row`` and ``values``, and leave a buffer of zeros. Collective over all ranks.

        ``tokens``: of prompts and responses, over all data ranks.
        """
        chunks = self._trainable.chunks
        losses = RouterLosses(*self._factors, tokens)
        with watched(chunks, losses):
            if losses.counts_first:
                forward_only(chunks, microbatches, _nothing, policy=self._wanted)
                losses.share_counts()
            self._trainable.zero_grad()
            forward_backward(chunks, microbatches, _no_loss, policy=self._wanted)
        for kept, piece in zip(self.row, self._shard.pieces, strict=True):
            kept.copy_(piece)
        self._trainable.zero_grad()
        values = losses.values
        dist.all_reduce(values)  # ranks have other tokens, or other layers
        self.values = (float(values[0]), float(values[1]))

    def add(self) -> None:
        """Add the gradient to what the buffer holds."""
        for kept, piece in zip(self.row, self._shard.pieces, strict=True):
            piece.add_(kept)


def _nothing(policy_BX: Tensor, batch: Experience) -> Tensor:
    return policy_BX.new_zeros(())


def _no_loss(policy_BX: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
    """A loss of 0 whose backward passes through the whole model, where routers add their own gradient."""
    return (policy_BX * 0.0).sum(), torch.zeros(1)
