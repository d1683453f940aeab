"""Losses of the routers of a model with experts: balance between experts, and size of the routers' logits.

Of every layer, over the tokens t of prompts and responses of a minibatch, whatever the ranks and microbatches
that they lie on (p: softmax of the logits x over all E experts; f_e: expert e's share of all choices):

- auxiliary loss: ``E sum_e f_e mean_t p_te``, 1 where tokens are spread evenly. Of Switch Transformers
  (arXiv 2101.03961, eq. 4), over the whole batch as in arXiv 2501.11873. f has no gradient.
- z loss: ``mean_t (log sum_e exp x_te)^2`` (ST-MoE, arXiv 2202.08906, eq. 5).

Megatron's own add their gradient to every backward, which would give one to every objective, and form f by
microbatch.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor, nn

from gapo_mega.engine.megatron.model.experts import Router


class RouterLosses:
    """What routers compute beside their choices, within ``watched``.

    First they count their choices, in a forward over all microbatches. After ``share_counts`` a forward and
    backward adds the losses' gradients, each loss times its factor, to those of the parameters.

    Attributes:
        values: auxiliary and z loss of this rank's tokens and layers [2], float64.
    """

    def __init__(self, aux: float, z: float, tokens: float) -> None:
        """``aux``, ``z``: factors; ``tokens``: of prompts and responses, over all data ranks."""
        self._aux, self._z, self._tokens = aux, z, tokens
        self._counts: dict[int, Tensor] = {}  # by layer: tokens that chose each expert [E]
        self._counting = aux > 0
        self.values = torch.zeros(2, dtype=torch.float64)

    @property
    def counts_first(self) -> bool:
        """Whether the choices have yet to be counted."""
        return self._counting

    def share_counts(self) -> None:
        """End the counting. Collective over the tensor and data ranks, which have other tokens."""
        layers = sorted(self._counts)
        counts_LE = torch.stack([self._counts[layer] for layer in layers])
        dist.all_reduce(counts_LE, group=parallel_state.get_tensor_and_data_parallel_group())
        self._counts = dict(zip(layers, counts_LE, strict=True))
        self._counting = False

    def chose(self, layer: int, map_NE: Tensor, real_N: Tensor) -> None:
        """Count what the real tokens chose."""
        if self._counting:
            chosen_E = (map_NE & real_N[:, None]).sum(dim=0).double()
            self._counts[layer] = self._counts.get(layer, torch.zeros_like(chosen_E)) + chosen_E

    def attach(self, layer: int, logits_NE: Tensor, real_N: Tensor) -> Tensor:
        """The logits, whose backward adds the losses' gradient."""
        # The first forward of a recomputed layer has no graph.
        if self._counting or not torch.is_grad_enabled():
            return logits_NE
        real_logits = logits_NE[real_N].float()
        losses = torch.zeros(2, device=logits_NE.device)
        if self._aux:
            counts_E = self._counts[layer]
            share_E = (counts_E / counts_E.sum()).float()
            mean_E = real_logits.softmax(dim=-1).sum(dim=0) / self._tokens
            losses[0] = len(share_E) * (share_E * mean_E).sum()
        if self._z:
            losses[1] = real_logits.logsumexp(dim=-1).square().sum() / self._tokens
        self.values += losses.detach().double().cpu()
        total = self._aux * losses[0] + self._z * losses[1]
        attached: Tensor = _Attached.apply(logits_NE, total)  # type: ignore[no-untyped-call]
        return attached


class _Attached(torch.autograd.Function):
    """``(x, loss) -> x``, with a gradient of 1 for ``loss`` beside that of ``x``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, loss: Tensor) -> Tensor:
        ctx.loss = loss.new_ones(())
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        return grads[0], ctx.loss


@contextmanager
def watched(chunks: Sequence[nn.Module], losses: RouterLosses) -> Iterator[None]:
    """Within the block the routers of these chunks report to ``losses``.

    Forwards there must tell them which tokens are real (``Wanted.tells_routers``).
    """
    routers = [module for chunk in chunks for module in chunk.modules() if isinstance(module, Router)]
    for router in routers:
        router.watch = losses
    try:
        yield
    finally:
        for router in routers:
            router.watch = None
