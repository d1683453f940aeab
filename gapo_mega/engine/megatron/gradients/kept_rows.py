"""``gradients.store: shards``: a row of this rank's reduced shard for every objective.

The last objective's row is Megatron's buffer itself, and the combination is written over it. Extra memory:
M - 1 shards.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.config.strategies.kept_rows import KeptRows
from gapo_mega.engine.base import Aggregator
from gapo_mega.engine.megatron.checkpoint.optimizer_state import main_parameters
from gapo_mega.engine.megatron.gradients.metric import inner_products
from gapo_mega.engine.megatron.gradients.passes import SharedGraph, Task, one_hot, passes_over
from gapo_mega.engine.megatron.gradients.row_buffer import RowBuffer
from gapo_mega.engine.megatron.gradients.shard import exchange
from gapo_mega.engine.megatron.gradients.update import Direction, GradientStrategy, Setting
from gapo_mega.engine.megatron.runtime.clock import Clock

_MOST_ROWS = 16  # of one call of the Gram kernel
_SMALL_PART = 0.1  # of the largest: a gradient out of the fp32 difference is good to 1e-5 above it


class Shards(GradientStrategy):
    """Every gradient is kept until the weights are known."""

    declaration = KeptRows

    def __init__(self, setting: Setting, declared: KeptRows) -> None:
        super().__init__(setting, declared)
        dtype = torch.bfloat16 if declared.gradients.store_dtype == "bf16" else torch.float32
        self._spare = [self.shard.zero_row(i, dtype) for i in range(1, setting.objectives)]
        self._rows: list[list[Tensor]] = []
        self._before = self.shard.zero_row(setting.objectives) if declared.measures_change else None

    @property
    def row_bytes(self) -> int:
        """See ``GradientStrategy.row_bytes``."""
        rows = [*self._spare, self._before or []]
        return sum(piece.numel() * piece.element_size() for row in rows for piece in row)

    def direction(self, task: Task, aggregator: Aggregator, clock: Clock) -> Direction:
        """See ``GradientStrategy.direction``."""
        in_turns = self.shared and len(task.microbatches) > 1
        losses = self._take_turns(task, clock) if in_turns else self._one_by_one(task, clock)
        gram = self.global_gram(inner_products(self.shard, self._rows, self.metric()))
        aggregated = ops.solve(gram, aggregator)
        if self._before is not None:
            self._put_large_part_last(gram, aggregated.weights)
        ops.combine_(self.shard.pieces, self._rows, aggregated.weights)
        found = Direction.of(losses, aggregated)
        clock.lap("aggregate")
        if self._before is not None and found.status == ops.Status.OK:
            self._remember(self._before)
            clock.lap("actual_change")
        return found

    def _one_by_one(self, task: Task, clock: Clock) -> Tensor:
        """Every objective's gradient into its row, all microbatches of one before the next objective."""
        passes = passes_over(self.trainable, task, self.shared)
        if self.shared:
            clock.lap("forward")
        self.keep_gradients(passes, self.shard, self._spare, clock, last=True)
        self._rows = [*self._spare, self.shard.pieces]
        return passes.losses

    def _take_turns(self, task: Task, clock: Clock) -> Tensor:
        """Every microbatch's part of all gradients while its graph is there."""
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
            del graph  # before the next one is built
            order.reverse()  # the next microbatch begins with the sum that the buffer holds
        self._rows = buffer.rows()
        return losses

    def predicted_norm(self, found: Direction) -> tuple[float, float]:
        """``sqrt(w'Gw)`` where G is euclidean: it checks inner products and combination together.

        Opposing gradients cancel, so what it can differ by is a share of ``sum w_i ||g_i||``.
        """
        if self._setting.adam:
            return super().predicted_norm(found)
        square = float(found.weights @ found.gram @ found.weights)
        return math.sqrt(max(square, 0.0)), float(found.weights.abs() @ found.gram.diagonal().sqrt())

    # -- the change that the optimizer made ----------------------------------------------------------
    def _put_large_part_last(self, gram: Tensor, weights: Tensor) -> None:
        """Let Megatron's buffer hold a row that makes up a good part of the combination.

        It is written over, and ``change`` needs its gradient again: out of the combination, in whose rounding
        a small part (none, in a corner) would be lost.
        """
        if self._setting.adam:
            gram = self.global_gram(inner_products(self.shard, self._rows))
        shares = (weights.abs() * gram.diagonal().sqrt()).tolist()
        held = next(k for k, row in enumerate(self._rows) if row is self.shard.pieces)
        largest = max(range(self.objectives), key=shares.__getitem__)
        if shares[held] < _SMALL_PART * shares[largest]:
            exchange(self._rows[held], self._rows[largest])
            self._rows[held], self._rows[largest] = self._rows[largest], self._rows[held]

    @torch.no_grad()
    def _remember(self, row: list[Tensor]) -> None:
        """This rank's part of the parameters, as the optimizer holds them, into ``row``."""
        for view, values in self._parameters(row):
            view.copy_(values)

    @torch.no_grad()
    def change(self, found: Direction, norm: float) -> list[float] | None:
        """``<parameters before - after, g_k>`` of every objective.

        The buffer holds the combination by now, in whose place ``g_last = (d - sum w_k g_k) / w_last`` is
        taken: NaN where the combination is zero.
        """
        if self._before is None:
            return None
        for view, values in self._parameters(self._before):
            view.sub_(values)
        products = self._products_with(self._before)
        last = next(k for k, row in enumerate(self._rows) if row is self.shard.pieces)
        # Megatron clips in place or in a copy: the norm tells what the buffer holds.
        square = self.global_gram(inner_products(self.shard, [self.shard.pieces]))
        scale = math.sqrt(float(square)) / norm if norm > 0 else 1.0
        weights = found.weights
        others = sum(float(weights[k]) * products[k] for k in range(self.objectives) if k != last)
        weight = float(weights[last])
        products[last] = (products[last] / scale - others) / weight if scale and weight else math.nan
        return products

    def _products_with(self, row: Sequence[Tensor]) -> list[float]:
        """Inner products of ``row`` with every row, over all ranks."""
        products: list[float] = []
        for start in range(0, self.objectives, _MOST_ROWS - 1):
            block = [row, *self._rows[start : start + _MOST_ROWS - 1]]
            gram = self.global_gram(inner_products(self.shard, block))
            products += gram[0, 1:].tolist()
        return products

    def _parameters(self, row: list[Tensor]) -> list[tuple[Tensor, Tensor]]:
        """(part of ``row``, the optimizer's own copy of the parameter there)."""
        (inner,) = self.trainable.optimizer.chained_optimizers
        held = {p: (start, main.detach().reshape(-1)) for p, main, start, _ in main_parameters(inner)}
        found = []
        for placement in self.shard.placements:
            begin, values = held[placement.parameter]
            found.append((self.shard.view(row, placement), placement.part_of(values, begin)))
        return found
