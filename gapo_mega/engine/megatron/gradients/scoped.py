"""``gradients.scope`` other than full: inner products over some parameters, an update of all.

Each objective's backward computes the gradient of the parameters in scope only. One backward of the weighted
sum of the losses then gives the gradient of all. With ``last_layer`` no objective has a backward of its own
through the model.
"""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.config.strategies.scoped import ScopedRows, has_output_layer, layers_in
from gapo_mega.engine.base import Aggregator
from gapo_mega.engine.megatron.gradients.output_layer import OutputLayer, parameters_of_layers
from gapo_mega.engine.megatron.gradients.passes import SeparatePasses, SharedGraph, Task, one_hot
from gapo_mega.engine.megatron.gradients.shard import GradientShard
from gapo_mega.engine.megatron.gradients.update import Direction, GradientStrategy, Setting
from gapo_mega.engine.megatron.model.forward import forward_only
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.types import Experience


class Scoped(GradientStrategy):
    """Keeps rows of the parameters in scope; the last one lies in Megatron's buffer."""

    declaration = ScopedRows

    def __init__(self, setting: Setting, declared: ScopedRows) -> None:
        super().__init__(setting, declared)
        modules, scope = setting.trainable.modules, declared.gradients.scope
        self._with_layers = declared.has_layers
        self._only = parameters_of_layers(modules, layers_in(scope, setting.layers))
        self._part = GradientShard(setting.trainable.chunks, self._only)
        self._spare = [self._part.zero_row(i) for i in range(1, setting.objectives)]
        self._output = (
            OutputLayer(modules[-1], setting.groups, setting.objectives) if has_output_layer(scope) else None
        )

    @property
    def row_bytes(self) -> int:
        rows = [piece for row in self._spare for piece in row]
        rows += self._output.rows if self._output is not None else []
        return sum(row.numel() * row.element_size() for row in rows)

    def direction(self, task: Task, aggregator: Aggregator, clock: Clock) -> Direction:
        """Up to M backwards of the parameters in scope, and one of all parameters."""
        if self._output is not None:
            self._output.clear()
        passes = self._shared_passes(task, clock) if self.shared else self._separate_passes(task, clock)
        if self._with_layers:
            self.keep_gradients(passes, self._part, self._spare, clock, self._only)
        found = Direction.of(passes.losses.clone(), ops.solve(self._gram(), aggregator))
        clock.lap("aggregate")
        if found.status == ops.Status.OK:
            passes.gradient(found.weights.tolist(), last=True)
            clock.lap("direction")
        return found

    def _shared_passes(self, task: Task, clock: Clock) -> SharedGraph:
        """Run the one forward, which also gives the output layer's rows."""
        (batch,) = task.microbatches
        if self._output is None:
            graph = SharedGraph(self.trainable, task, batch)
            clock.lap("forward")
            return graph
        with self._output.listening():
            graph = SharedGraph(self.trainable, task, batch)
            clock.lap("forward")
            count = self.objectives
            self._output.add(graph.batch, lambda k: graph.cotangent(one_hot(k, count)))
            clock.lap("output_layer")
        return graph

    def _separate_passes(self, task: Task, clock: Clock) -> SeparatePasses:
        """Compute the output layer's rows by a forward without a graph; the passes run later."""
        passes = SeparatePasses(self.trainable, task)
        output = self._output
        if output is None:
            return passes

        def add(logits_NV: Tensor, batch: Experience) -> Tensor:
            leaf_NV = logits_NV.detach().requires_grad_()
            with torch.enable_grad():
                losses = task.losses(leaf_NV, batch)
            output.add(batch, lambda k: torch.autograd.grad(losses[k], leaf_NV, retain_graph=True)[0])
            passes.losses += torch.stack(losses).detach().double().cpu()
            return passes.losses

        with output.listening():
            forward_only(self.trainable.chunks, task.microbatches, add, at_responses=True)
        clock.lap("output_layer")
        return passes

    def _gram(self) -> Tensor:
        """Gram matrix [M, M] float64 on the CPU over all ranks, summed over layers and output layer."""
        gram = torch.zeros(self.objectives, self.objectives, dtype=torch.float64)
        if self._with_layers:
            rows = [*self._spare, self._part.pieces]
            gram += self.gram(self._part, rows, self.metric()).cpu()
        if self._output is not None:
            gram += self._output.gram()
        return self.agreed(gram)
