"""Gradients of linear combinations of one minibatch's objectives, reduced, in Megatron's buffer.

``SeparatePasses`` runs Megatron's schedule once per gradient and works in every layout. ``SharedGraph``
runs one forward over one microbatch, and one backward through its graph per gradient. The strategy
``one_pass.py`` computes all gradients at once, and needs neither.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.autograd.graph import get_gradient_edge

from gapo_mega.engine.base import PolicyLossSum
from gapo_mega.engine.megatron.gradients.meter import Meter
from gapo_mega.engine.megatron.model.forward import forward_backward, run_at_responses, sequence_multiple
from gapo_mega.engine.megatron.model.logprobs import (
    SEVERAL,
    Backwards,
    Distribution,
    Entropy,
    Wanted,
    logprobs_of,
)
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.model.reduction import reduce_gradients, without_overlap
from gapo_mega.engine.megatron.runtime.cpu import device
from gapo_mega.losses.base import normalization_of
from gapo_mega.losses.normalization import total
from gapo_mega.types import Experience

Only = Collection[nn.Parameter] | None  # the parameters to differentiate with respect to; None: all


@dataclass(frozen=True)
class Task:
    """The losses ``L_k`` to differentiate: means over the responses of all ranks and microbatches."""

    microbatches: list[Experience]
    loss: PolicyLossSum
    divisor: float  # of the loss's sum over microbatches and data ranks: their response tokens, usually
    distribution: Distribution
    objectives: int
    padding: float = 1.0  # tokens in the microbatches over those of prompts and responses, over all ranks
    tokens: float = 0.0  # of prompts and responses, over all data ranks
    backwards: Backwards = SEVERAL  # through the graph of a microbatch's losses
    meter: Meter | None = None
    entropy: Entropy = "none"
    entropy_beta: float = 0.0  # every L_k has -entropy_beta times the mean entropy added
    chunk: int = 0  # positions whose logits are in memory at once; 0: all

    def losses(
        self, logits_NV: Tensor, batch: Experience, wanted: Collection[int] | None = None
    ) -> list[Tensor]:
        """This microbatch's part of every ``L_k``, with a graph; 0 for objectives not in ``wanted``.

        ``logits_NV``: those that predict response tokens, in the order of the mask; overwritten.
        """
        return self.losses_of(self.policy_of(logits_NV, batch, self.backwards), batch, wanted)

    def wanted(self, backwards: Backwards) -> Wanted:
        """What a forward gives for ``losses_of``."""
        return Wanted(self.distribution, backwards, self.entropy, self.chunk)

    def policy_of(self, logits_NV: Tensor, batch: Experience, backwards: Backwards) -> Tensor:
        """All that losses depend on, [B, X]: log-probabilities and, where they are wanted, entropies."""
        return logprobs_of(logits_NV, batch, self.distribution, backwards, self.entropy)

    def losses_of(
        self, policy_BX: Tensor, batch: Experience, wanted: Collection[int] | None = None
    ) -> list[Tensor]:
        """``losses`` from what ``policy_of`` gives."""
        logprobs_BT, entropy_BT = policy_BX, None
        if self.entropy != "none":
            logprobs_BT, entropy_BT = policy_BX.chunk(2, dim=1)
        if self.meter is not None:
            self.meter.take(logprobs_BT, entropy_BT, batch)
        losses = [
            self.loss(logprobs_BT, batch, k) / self.divisor
            if wanted is None or k in wanted
            else logprobs_BT.new_zeros(())
            for k in range(self.objectives)
        ]
        if entropy_BT is None or self.entropy_beta == 0:
            return losses
        entropy = total(entropy_BT, batch.response_mask_BT, normalization_of(self.loss))
        bonus = self.entropy_beta * entropy / self.divisor
        assert batch.advantages_MBT is not None
        having = range(len(batch.advantages_MBT))  # a row without advantages, such as the KL's, has no bonus
        return [
            loss - bonus if k in having and (wanted is None or k in wanted) else loss
            for k, loss in enumerate(losses)
        ]


class Passes(Protocol):
    """Gradients of one task at the current parameters."""

    @property
    def losses(self) -> Tensor:
        """This rank's part of every ``L_k`` computed so far [M], float64 on the CPU; last stage only."""
        ...

    def gradient(self, coefficients: Sequence[float], only: Only = None, last: bool = False) -> None:
        """Leave the reduced gradient of ``sum_k coefficients_k L_k`` in Megatron's buffer.

        Args:
            only: parameters to differentiate with respect to; the buffer is undefined at all others.
            last: no further gradient follows, so the backward frees a kept graph.
        """
        ...


def one_hot(index: int, count: int) -> list[float]:
    """Coefficients of ``L_index`` alone."""
    return [float(k == index) for k in range(count)]


def combined(losses: Sequence[Tensor], coefficients: Sequence[float]) -> Tensor:
    """``sum_k coefficients_k losses_k`` without the terms of coefficient 0, which may be NaN."""
    terms = [c * loss for c, loss in zip(coefficients, losses, strict=True) if c != 0.0]
    # All weights may be 0: every rank must still run the same passes, for a gradient of zeros.
    return torch.stack(terms).sum() if terms else losses[0] * 0.0


class SeparatePasses:
    """One forward and backward over all microbatches for every gradient."""

    def __init__(self, trainable: Trainable, task: Task) -> None:
        self._trainable = trainable
        self._task = replace(task, backwards=Backwards(last=True))
        self.losses = torch.zeros(task.objectives, dtype=torch.float64)

    def gradient(self, coefficients: Sequence[float], only: Only = None, last: bool = False) -> None:
        """Ignores ``last``: no graph outlives its pass."""
        task = self._task
        wanted = {k for k, c in enumerate(coefficients) if c != 0.0}

        def mixed(policy_BX: Tensor, batch: Experience) -> tuple[Tensor, Tensor]:
            parts = task.losses_of(policy_BX, batch, wanted or {0})
            return combined(parts, coefficients), torch.stack(parts)

        self._trainable.zero_grad()
        trainable = self._trainable
        with nullcontext() if only is None else _training_only(trainable, only):
            found = forward_backward(
                trainable.chunks,
                task.microbatches,
                mixed,
                task.objectives,
                policy=task.wanted(task.backwards),
            )
        for k in wanted:
            self.losses[k] = found[k]


class SharedGraph:
    """One forward over one microbatch, whose graph is kept. Works without pipeline parallelism only."""

    def __init__(self, trainable: Trainable, task: Task, batch: Experience) -> None:
        self._trainable = trainable
        self._task = task
        model = trainable.model
        self.batch = batch.to(device())
        logits_NV = run_at_responses(model, batch, sequence_multiple(model))
        # Keeps the logits' place in the graph but not the logits, which the losses overwrite.
        self._logits = get_gradient_edge(logits_NV)
        self._losses = task.losses(logits_NV, self.batch)
        self.losses = torch.stack(self._losses).detach().double().cpu()

    def cotangent(self, coefficients: Sequence[float], last: bool = False) -> Tensor:
        """Gradient of the combined loss with respect to the logits at the response positions [N, V].

        ``last`` frees the losses' part of the graph.
        """
        total = combined(self._losses, coefficients)
        if last:
            self._losses = []
        (grad_NV,) = torch.autograd.grad(total, self._logits, retain_graph=not last)
        return grad_NV

    def gradient(self, coefficients: Sequence[float], only: Only = None, last: bool = False) -> None:
        """One backward through the kept graph, and the reduction over data ranks."""
        self._trainable.zero_grad()
        self.add_gradient(coefficients, only, last)

    def add_gradient(self, coefficients: Sequence[float], only: Only = None, last: bool = False) -> None:
        """Like ``gradient``, added to the buffer: the reduction over data ranks sums old and new content."""
        model = self._trainable.model
        with nullcontext() if only is None else without_overlap([model]):
            torch.autograd.backward(
                self._logits,
                self.cotangent(coefficients, last),
                retain_graph=not last,
                inputs=None if only is None else list(only),
            )
            reduce_gradients([model])


def passes_over(trainable: Trainable, task: Task, shared: bool) -> Passes:
    """The passes over ``task``. Shared passes run the forward here and keep its graph while they live."""
    if not shared:
        return SeparatePasses(trainable, task)
    assert len(task.microbatches) == 1
    return SharedGraph(trainable, task, task.microbatches[0])


@contextmanager
def _training_only(trainable: Trainable, only: Collection[nn.Parameter]) -> Iterator[None]:
    """Freeze all other parameters, so that no backward runs below the first of ``only``.

    With full recomputation the embedding keeps its gradient: Megatron's checkpoint function gives the layers
    within it gradients only if its input requires one.
    """
    kept = set(only)
    chunks = trainable.chunks
    if chunks[0].config.recompute_granularity == "full":
        kept |= {p for chunk in chunks for name, p in chunk.named_parameters() if "embedding" in name}
    frozen = [p for p in trainable.parameters() if p.requires_grad and p not in kept]
    try:
        for parameter in frozen:
            parameter.requires_grad_(False)
        with without_overlap(chunks), trainable.parameters_gathered():
            yield
    finally:
        for parameter in frozen:
            parameter.requires_grad_(True)
