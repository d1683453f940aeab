"""One policy update on the aggregated gradient of all objectives: what every strategy shares.

A strategy measures the Gram matrix of the objectives' gradients, asks the aggregator for weights, and
leaves the combined gradient in Megatron's buffer, where the optimizer reads it. Strategies differ in the rows
that they keep, the passes that they take and the parameters that they measure.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega import ops
from gapo_mega.aggregation.base import zero_objectives
from gapo_mega.config.strategies import StrategyDeclaration
from gapo_mega.engine.base import Aggregator, GradientReport, PolicyLossSum
from gapo_mega.engine.megatron.gradients.averages import AveragedRows
from gapo_mega.engine.megatron.gradients.meter import Meter
from gapo_mega.engine.megatron.gradients.metric import AdamMetric, Row, inner_products
from gapo_mega.engine.megatron.gradients.passes import Only, Passes, Task, one_hot
from gapo_mega.engine.megatron.gradients.router_gradient import RouterGradient
from gapo_mega.engine.megatron.gradients.shard import GradientShard
from gapo_mega.engine.megatron.model import experts
from gapo_mega.engine.megatron.model.buffers import optimizer_instances
from gapo_mega.engine.megatron.model.forward import split_evenly
from gapo_mega.engine.megatron.model.logprobs import Distribution, Entropy
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.runtime.clock import Clock
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.losses.base import normalization_of
from gapo_mega.losses.normalization import ResponseCounts, divisor
from gapo_mega.types import Experience

# The Gram matrix sums in fp64 what Megatron's norm sums in fp32.
_NORM_TOLERANCE = 1e-4
# Megatron sums squares in fp32. They are normal numbers where 2^32 elements have the least norm together,
# and finite up to the largest.
_LEAST_NORM = 2.0**-44
_LARGEST_NORM = 2.0**64


@dataclass(frozen=True)
class Direction:
    """What a strategy found. The buffer holds ``sum_k w_k g_k`` if ``status`` is OK."""

    losses: Tensor  # [M] float64, CPU: this rank's part, on the last stage
    gram: Tensor  # [M, M] float64, CPU, over all ranks; NaN or Inf if a gradient has one
    weights: Tensor  # [M] float64, CPU
    status: ops.Status
    aggregated: ops.Aggregated  # what the aggregator saw and returned, on the Gram matrix's device
    averaged: Tensor | None = None  # [M, M] float64, CPU: what the aggregator saw, if that is not ``gram``
    refused: str | None = None  # why the optimizer must not step although the status is OK

    @classmethod
    def of(cls, losses: Tensor, aggregated: ops.Aggregated) -> Direction:
        """Copy what the aggregator found to the host, which waits for the device."""
        status = ops.Status(int(aggregated.status))
        return cls(losses, aggregated.gram.cpu(), aggregated.weights.cpu(), status, aggregated)

    @property
    def seen(self) -> Tensor:
        """The Gram matrix that the aggregator saw, on the CPU."""
        return self.gram if self.averaged is None else self.averaged


@dataclass(frozen=True)
class Setting:
    """What every strategy is built from."""

    trainable: Trainable
    groups: Groups
    objectives: int
    distribution: Distribution  # that responses are drawn from
    layers: int  # of the whole model
    micro_batch: int  # sequences per microbatch
    shared: bool  # all objectives' backwards share one forward's graph per microbatch
    adam: bool  # inner products in Adam's metric
    longest: int  # tokens that a response may have
    average: float = 0.0  # decay of the gradients' running means; 0: none are kept
    average_dtype: torch.dtype = torch.float32
    entropy_beta: float = 0.0  # of the bonus in every objective's loss
    measures_entropy: bool = False
    chunk: int = 0  # positions whose logits are in memory at once; 0: all
    routers: tuple[float, float] = (0.0, 0.0)  # factors of the auxiliary and the z loss of experts' routers
    micro_batch_tokens: int | None = None  # of a packed row, in place of ``micro_batch``

    @property
    def entropy(self) -> Entropy:
        """What a forward has to compute of it."""
        return "trained" if self.entropy_beta else "measured" if self.measures_entropy else "none"


def summands(weights: Tensor, gram: Tensor) -> float:
    """``sum_i |w_i| ||g_i||``: the size of what the combination adds up."""
    return float((weights.abs() * gram.diagonal().sqrt()).sum())


def why_unmeasured(size: float) -> str | None:
    """Why Megatron finds no norm of weighted gradients of ``size`` in all; None if it is not their size."""
    if _LEAST_NORM <= size <= _LARGEST_NORM:
        return None
    return (
        f"the weighted gradients have a norm of {size:.3g} in all, accepted: {_LEAST_NORM:.2g} to "
        f"{_LARGEST_NORM:.2g}, which Megatron can measure in float32 (aggregation.options.scale: mean_norm "
        "gives them the length of an ordinary gradient)"
    )


class GradientStrategy(ABC):
    """Measures, aggregates, and takes one optimizer step."""

    declaration: ClassVar[type[StrategyDeclaration]]  # that this class implements
    averages: AveragedRows | None = None  # running means of the gradients, which belong into checkpoints

    def __init__(self, setting: Setting, declared: StrategyDeclaration) -> None:
        """``declared``: the instance of ``declaration`` with the run's settings."""
        self._setting = setting
        self.trainable = trainable = setting.trainable
        self.groups = setting.groups
        self.objectives = setting.objectives
        self.shared = setting.shared
        self.shard = GradientShard(trainable.chunks)
        # With the distributed optimizer data ranks hold different shards, without it the same gradient:
        # Megatron's own group for gradient norms has the ranks to sum over.
        optimizers = trainable.optimizer.chained_optimizers
        self._sums_over = [optimizer.get_grad_stats_parallel_group() for optimizer in optimizers]
        assert all(group is not None for group in self._sums_over)
        self._norm_checked = False
        self.routers: RouterGradient | None = None
        if any(setting.routers):
            row = self.shard.zero_row(setting.objectives + 1)
            self.routers = RouterGradient(
                trainable, self.shard, row, setting.distribution, setting.chunk, setting.routers
            )
        self.unfit: str | None = None  # why there is no step, whatever the objectives' gradients are

    @abstractmethod
    def direction(self, task: Task, aggregator: Aggregator, clock: Clock) -> Direction:
        """Measure the Gram matrix, find weights, and leave the combined gradient in Megatron's buffer."""

    @property
    @abstractmethod
    def row_bytes(self) -> int:
        """Bytes on this rank for gradients besides Megatron's own buffer, by the tensors."""

    def step(self, minibatch: Experience, loss: PolicyLossSum, aggregator: Aggregator) -> GradientReport:
        """Measure every objective's gradient, aggregate, and take one optimizer step.

        Asks the aggregator once, and commits its answer only after the optimizer has taken the step.
        """
        clock = Clock()
        method = ops.method_of(aggregator)
        task = self._task(minibatch, loss)
        routers = self._measure_routers(task, clock)
        report = self._take(task, method, clock)
        policy = None if task.meter is None else task.meter.facts(self.groups)
        return replace(report, padding=task.padding, policy=policy, routers=routers)

    def _measure_routers(self, task: Task, clock: Clock) -> dict[str, float]:
        """Compute the gradient of the routers' losses. Returns what the log says of them."""
        if self.routers is None:
            return {}
        self.routers.measure(task.microbatches, task.tokens)
        square = float(self.gram(self.shard, [self.routers.row]))
        self.unfit = None if math.isfinite(square) else "the gradient of the routers' losses is not finite"
        clock.lap("routers")
        aux, z = self.routers.values
        return {"router_aux_loss": aux, "router_z_loss": z, "router_gradient_norm": math.sqrt(square)}

    def _take(self, task: Task, method: ops.AggregationMethod, clock: Clock) -> GradientReport:
        found = self.direction(task, method, clock)
        losses = self.groups.sum_over_data(self.groups.from_last_stage(found.losses)).tolist()
        # A NaN or Inf in a gradient makes its own squared norm NaN or Inf, if it is in scope.
        nonfinite = [i for i, square in enumerate(found.gram.diagonal()) if not math.isfinite(square)]
        if nonfinite or found.status in (ops.Status.NOT_FINITE, ops.Status.NOT_CONVERGED):
            self.trainable.zero_grad()
            gave_up = not nonfinite and found.status == ops.Status.NOT_CONVERGED
            reason = str(method.error(found.aggregated)) if gave_up else None
            return self._skipped(losses, found, clock, nonfinite, reason)
        if found.status != ops.Status.OK:
            self.trainable.zero_grad()
            raise method.error(found.aggregated)
        refused = found.refused or self.unfit
        if refused is not None:
            self.trainable.zero_grad()
            return self._skipped(losses, found, clock, nonfinite, refused)
        measured = self.trainable.grad_norm()
        size = summands(found.weights, found.gram)
        if not math.isfinite(measured) or (measured == 0.0 and 0.0 < size < _LEAST_NORM):
            # Not finite, and not in the Gram matrix: outside the scope, in a last pass, or from huge weights.
            # Megatron would take the step.
            self.trainable.zero_grad()
            return self._skipped(losses, found, clock, nonfinite, why_unmeasured(size))
        clock.lap("optimizer")
        if not self._norm_checked:
            self._norm_checked = self._check_norm(found, measured)
            clock.lap("check")
        if self.routers is not None:
            self.routers.add()
        learning_rate = self.trainable.optimizer.param_groups[0]["lr"]
        norm = self.trainable.step()
        method.commit(found.aggregated)
        clock.lap("optimizer")
        change = self.change(found, norm)
        if change is not None:
            clock.lap("actual_change")
        clip = self.trainable.optimizer.config.clip_grad
        return GradientReport(
            losses=losses,
            gram=found.gram,
            averaged_gram=found.averaged,
            weights=found.weights,
            gradient_norm=norm,
            # Megatron's own formula, so that the log shows what it did.
            clip_factor=min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0,
            learning_rate=learning_rate,
            excluded=zero_objectives(found.seen),
            actual_change=change,
            seconds=clock.seconds,
        )

    def keep_gradients(
        self,
        passes: Passes,
        shard: GradientShard,
        spare: Sequence[Sequence[Tensor]],
        clock: Clock,
        only: Only = None,
        last: bool = False,
    ) -> None:
        """Compute the objectives' gradients in order: all but the last move to ``spare``, the last stays.

        Every row of ``spare`` is shaped like ``shard``. ``only``, ``last``: as for ``Passes.gradient``.
        """
        for index in range(self.objectives):
            passes.gradient(one_hot(index, self.objectives), only, last and index == self.objectives - 1)
            if index != self.objectives - 1:
                for kept, piece in zip(spare[index], shard.pieces, strict=True):
                    kept.copy_(piece)
            clock.lap(self.lap_of(index))

    def lap_of(self, index: int) -> str:
        """The clock's name for the passes of one objective."""
        return f"backward/{index}" if self.shared else f"forward_backward/{index}"

    def metric(self) -> AdamMetric | None:
        """Adam's metric from the optimizer's current state, or None for the euclidean one."""
        return AdamMetric(self.trainable.optimizer) if self._setting.adam else None

    def gram(self, shard: GradientShard, rows: Sequence[Row], metric: AdamMetric | None = None) -> Tensor:
        """The Gram matrix of ``rows`` of the shards of all ranks, bit for bit the same on every rank.

        Experts and all other parameters are summed over groups of their own, as in Megatron's norm. Without
        the distributed optimizer every replica sums its own parts, and so does every instance of it, perhaps
        in another order, so rank 0 broadcasts its sum: weights that differ in one bit would let replicas
        drift apart.
        """
        sums = [
            ops.sum_gram_(inner_products(shard, rows, metric, counted), group)
            for counted, group in zip(shard.counted, self._sums_over, strict=True)
        ]
        gram = sums[0] if len(sums) == 1 else torch.stack(sums).sum(dim=0)
        one_sum = self.trainable.chunks[0].ddp_config.use_distributed_optimizer and optimizer_instances() == 1
        return gram if one_sum else self.agreed(gram)

    @staticmethod
    def agreed(tensor: Tensor) -> Tensor:
        """Broadcast rank 0's numbers to every rank, in place."""
        dist.broadcast(tensor, src=0)
        return tensor

    def change(self, found: Direction, norm: float) -> list[float] | None:
        """``<parameters before - after, g_k>`` per objective; None unless the strategy measures it."""
        return None

    def _task(self, minibatch: Experience, loss: PolicyLossSum) -> Task:
        setting = self._setting
        chunks, size, row = self.trainable.chunks, setting.micro_batch, setting.micro_batch_tokens
        pieces = split_evenly(self.groups, chunks, minibatch, size, row)
        experts.assert_in_step(len(pieces.parts))
        lengths_B = minibatch.response_mask_BT.sum(dim=1)
        responses = int(lengths_B.sum()), int((lengths_B > 0).sum())
        counts = *responses, pieces.computed, int(minibatch.lengths_B.sum())
        local = torch.tensor(counts, dtype=torch.float64)
        # Divides by global counts, so that every token or sequence weighs the same on all ranks and
        # microbatches.
        tokens, sequences, computed, needed = self.groups.sum_over_data(local).tolist()
        found = ResponseCounts(tokens, sequences, setting.longest)
        return Task(
            pieces.parts,
            loss,
            divisor(normalization_of(loss), found),
            setting.distribution,
            self.objectives,
            padding=computed / needed,
            tokens=needed,
            meter=Meter(loss, self.objectives, len(pieces.parts), setting.entropy != "none"),
            entropy=setting.entropy,
            entropy_beta=setting.entropy_beta,
            chunk=setting.chunk,
        )

    def predicted_norm(self, found: Direction) -> tuple[float, float]:
        """Norm of the combined gradient by our own inner products, and the size of its summands."""
        square = self.gram(self.shard, [self.shard.pieces])
        norm = math.sqrt(float(square))
        return norm, norm

    def _check_norm(self, found: Direction, measured: float) -> bool:
        """Compare our norm of the combined gradient with Megatron's, before the first update.

        Returns False if every weighted gradient is zero, or so small that Megatron's squares in fp32 are:
        that proves nothing.
        """
        predicted, scale = self.predicted_norm(found)
        if scale < _LEAST_NORM:
            return False
        if not abs(measured - predicted) <= _NORM_TOLERANCE * scale:
            raise RuntimeError(
                f"the Gram matrix predicts a combined gradient of norm {predicted:.9g} and Megatron "
                f"measures {measured:.9g}: this version of megatron-core lays its gradient buffers out "
                "in a way that gapo_mega does not know, training would be wrong"
            )
        return True

    @staticmethod
    def _skipped(
        losses: list[float],
        found: Direction,
        clock: Clock,
        nonfinite: Sequence[int],
        reason: str | None = None,
    ) -> GradientReport:
        return GradientReport(
            losses=losses,
            gram=found.gram,
            averaged_gram=found.averaged,
            weights=torch.zeros(len(found.gram), dtype=torch.float64),
            gradient_norm=0.0,
            clip_factor=1.0,
            learning_rate=0.0,
            skipped=True,
            reason=reason,
            nonfinite=list(nonfinite),
            excluded=zero_objectives(found.seen),
            seconds=clock.seconds,
        )
