"""``gradients.store: shards``: one row of this rank's reduced shard for every objective.

One row is Megatron's buffer itself, and the combination overwrites it. Extra memory: M - 1 shards.
"""

from __future__ import annotations

import math
from dataclasses import replace

import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.config.strategies.kept_rows import KeptRows
from gapo_mega.engine.base import Aggregator
from gapo_mega.engine.megatron.gradients.averages import AveragedRows
from gapo_mega.engine.megatron.gradients.passes import SharedGraph, Task, one_hot, passes_over
from gapo_mega.engine.megatron.gradients.row_buffer import RowBuffer
from gapo_mega.engine.megatron.gradients.shard import bytes_of, exchange
from gapo_mega.engine.megatron.gradients.update import (
    Direction,
    GradientStrategy,
    Setting,
    summands,
    why_unmeasured,
)
from gapo_mega.engine.megatron.model.main_parameters import main_parameters
from gapo_mega.engine.megatron.runtime.clock import Clock

_SMALL_PART = 0.1  # share of the largest part; above it, recovering a row from the fp32 sum is good to 1e-5


class Shards(GradientStrategy):
    """Keeps every gradient until the weights are known."""

    declaration = KeptRows

    def __init__(self, setting: Setting, declared: KeptRows) -> None:
        super().__init__(setting, declared)
        self._spare = self.allocate(declared)
        self._rows: list[list[Tensor]] = []
        self._before = self.shard.zero_row(setting.objectives) if declared.measures_change else None
        if setting.average > 0:
            self.averages = AveragedRows(self.shard, self.objectives, setting.average, setting.average_dtype)

    def allocate(self, declared: KeptRows) -> list[list[Tensor]]:
        """Memory for all rows but the last, each shaped like the shard."""
        dtype = torch.bfloat16 if declared.gradients.store_dtype == "bf16" else torch.float32
        return [self.shard.zero_row(i, dtype) for i in range(1, self.objectives)]

    @property
    def row_bytes(self) -> int:
        return bytes_of([*self._spare, *self.other_rows])

    @property
    def other_rows(self) -> list[list[Tensor]]:
        """Rows of the shard that hold no gradient of this update."""
        rows = [] if self._before is None else [self._before]
        return rows if self.averages is None else [*rows, *self.averages.rows]

    def direction(self, task: Task, aggregator: Aggregator, clock: Clock) -> Direction:
        """M gradients, one all-reduce of the Gram matrix, and one pass over memory for the combination."""
        losses = self.measure(task, clock)
        gram, averaged = self._grams()
        aggregated = ops.solve(gram if averaged is None else averaged, aggregator)
        euclidean = gram
        if self._setting.adam and (self._before is not None or self.averages is not None):
            euclidean = self.gram(self.shard, self._rows)
        refused = self._add_to_averages(gram, euclidean, aggregated)
        if self._before is not None:
            self._put_large_part_last(euclidean, aggregated.weights)
        ops.combine_(self.shard.pieces, self._rows, aggregated.weights)
        found = Direction.of(losses, aggregated)
        if averaged is not None:
            found = replace(found, gram=gram.cpu(), averaged=found.gram, refused=refused)
        clock.lap("aggregate")
        if self._before is not None and found.status == ops.Status.OK:
            self._remember(self._before)
            clock.lap("actual_change")
        return found

    def measure(self, task: Task, clock: Clock) -> Tensor:
        """Fill the rows. Returns this rank's part of every loss."""
        if self.shared and len(task.microbatches) > 1:
            return self._take_turns(task, clock)
        return self.one_by_one(task, clock)

    def one_by_one(self, task: Task, clock: Clock) -> Tensor:
        """Compute the gradients objective by objective, each over all microbatches."""
        passes = passes_over(self.trainable, task, self.shared)
        if self.shared:
            clock.lap("forward")
        self.keep_gradients(passes, self.shard, self._spare, clock, last=True)
        self._rows = [*self._spare, self.shard.pieces]
        return passes.losses

    def _take_turns(self, task: Task, clock: Clock) -> Tensor:
        """Accumulate all gradients microbatch by microbatch, so that only one graph is alive at a time."""
        buffer = RowBuffer(self.trainable, self.shard, self._spare)
        losses = torch.zeros(self.objectives, dtype=torch.float64)
        order = list(range(self.objectives))
        for batch in task.microbatches:
            graph = SharedGraph(self.trainable, task, batch)
            clock.lap("forward")
            for index in order:
                buffer.bring(index)
                graph.add_gradient(one_hot(index, self.objectives), last=index == order[-1])
                clock.lap(self.lap_of(index))
            losses += graph.losses
            del graph  # frees its memory before the next forward
            order.reverse()  # the next microbatch starts with the objective whose sum the buffer holds
        self._rows = buffer.rows()
        return losses

    def predicted_norm(self, found: Direction) -> tuple[float, float]:
        """``sqrt(w'Gw)`` if G is euclidean, which checks inner products and combination together.

        Opposing gradients cancel, so the tolerance is a share of ``sum |w_i| ||g_i||``.
        """
        if self._setting.adam:
            return super().predicted_norm(found)
        square = float(found.weights @ found.gram @ found.weights)
        return math.sqrt(max(square, 0.0)), summands(found.weights, found.gram)

    # -- running means -------------------------------------------------------------------------------
    def _grams(self) -> tuple[Tensor, Tensor | None]:
        """The Gram matrices of the gradients and of their running means with them, over all ranks."""
        metric = self.metric()
        if self.averages is None:
            return self.gram(self.shard, self._rows, metric), None
        both = self.gram(self.shard, [*self.averages.rows, *self._rows], metric)
        return self.averages.grams(both)

    def _add_to_averages(self, gram: Tensor, euclidean: Tensor, aggregated: ops.Aggregated) -> str | None:
        """Add the gradients to their running means if the optimizer is going to step.

        The combination is about to overwrite a gradient, so this cannot wait for the step. Returns why there
        must be no step although the aggregator found weights: where Megatron might not measure the
        combination's norm, nobody knows yet whether it would take the step.
        """
        if self.averages is None or not aggregated.ok() or not bool(gram.isfinite().all()):
            return None
        size = summands(aggregated.weights.cpu(), euclidean.cpu())
        refused = self.unfit or (why_unmeasured(size) if size else None)
        if refused is None:
            self.averages.add(self._rows)
        return refused

    # -- the change that the optimizer made ----------------------------------------------------------
    def _put_large_part_last(self, euclidean: Tensor, weights: Tensor) -> None:
        """Move a row that makes up a good part of the combination into Megatron's buffer.

        The combination overwrites the buffer's row, and ``change`` recovers that gradient from the
        combination. The rounding of the combination would swallow a small part, and a weight of 0 leaves
        nothing to recover.
        """
        shares = (weights.abs() * euclidean.diagonal().sqrt()).tolist()
        held = next(k for k, row in enumerate(self._rows) if row is self.shard.pieces)
        largest = max(range(self.objectives), key=shares.__getitem__)
        if shares[held] < _SMALL_PART * shares[largest]:
            exchange(self._rows[held], self._rows[largest])
            self._rows[held], self._rows[largest] = self._rows[largest], self._rows[held]

    @torch.no_grad()
    def _remember(self, row: list[Tensor]) -> None:
        """Copy this rank's part of the optimizer's parameters into ``row``."""
        for view, values in self._parameters(row):
            view.copy_(values)

    @torch.no_grad()
    def change(self, found: Direction, norm: float) -> list[float] | None:
        """``<parameters before - after, g_k>`` of every objective.

        The combination d has overwritten one row, which is ``g_last = (d - sum w_k g_k) / w_last``. Its
        product is NaN if w_last is zero or clipping left nothing of d. The gradient of the routers' losses is
        in the buffer, too.
        """
        if self._before is None:
            return None
        for view, values in self._parameters(self._before):
            view.sub_(values)
        routers = [] if self.routers is None else [self.routers.row]
        gram = self.gram(self.shard, [self._before, *self._rows, *routers])
        products: list[float] = gram[0, 1 : self.objectives + 1].tolist()
        others = float(gram[0, self.objectives + 1 :].sum())
        last = next(k for k, row in enumerate(self._rows) if row is self.shard.pieces)
        # Megatron clips in place or in a copy: the buffer's norm shows whether it holds the clipped gradient.
        square = self.gram(self.shard, [self.shard.pieces])
        scale = math.sqrt(float(square)) / norm if norm > 0 else 1.0
        weights = found.weights
        others += sum(float(weights[k]) * products[k] for k in range(self.objectives) if k != last)
        weight = float(weights[last])
        products[last] = (products[last] / scale - others) / weight if scale and weight else math.nan
        return products

    def _parameters(self, row: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """Pairs of a part of ``row`` and the optimizer's own copy of the parameter there."""
        held = {
            p: (start, main.detach().reshape(-1))
            for inner in self.trainable.optimizer.chained_optimizers
            for p, main, start, _ in main_parameters(inner)
        }
        found = []
        for placement in self.shard.placements:
            begin, values = held[placement.parameter]
            found.append((self.shard.view(row, placement), placement.part_of(values, begin)))
        return found
