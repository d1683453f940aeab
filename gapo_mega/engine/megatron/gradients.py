"""Exact multi-objective gradients on Megatron's own buffers.

Per objective: zero the buffer, one forward and backward through the schedule, data-parallel
reduction. What the rank then owns is its *shard* (its slice of every bucket with the distributed
optimizer, all of every bucket without). The first M - 1 shards are copied into rows; the last
objective's row is the buffer itself. The Gram matrix of the rows is summed over the ranks that
hold different pieces, and the weighted combination is written over the last row, where the
optimizer reads its gradient. Extra memory: M - 1 shards.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

import torch
from megatron.core import parallel_state
from megatron.core.tensor_parallel import param_is_not_tensor_parallel_duplicate
from megatron.core.transformer.module import param_is_not_shared
from torch import Tensor

from gapo_mega import ops
from gapo_mega.engine.base import Aggregator, GradientReport, PolicyLoss
from gapo_mega.engine.megatron.build import Trainable
from gapo_mega.engine.megatron.forward import forward_backward
from gapo_mega.engine.megatron.groups import Groups
from gapo_mega.engine.megatron.logprobs import response_logprobs
from gapo_mega.types import Experience

# sqrt(w'Gw) and Megatron's norm are both fp32 sums over the same elements, in different orders.
# Their difference is a share of sum w_i ||g_i||, not of the result: opposing gradients cancel.
_IDENTITY_TOLERANCE = 1e-4

_STAGGER = 17 * 64  # bytes: whole cache lines, and few rows meet again within a page


class GradientShard:
    """This rank's own part of the reduced gradient: views into Megatron's buffers.

    ``pieces``: one flat tensor per bucket. ``segments``: the ``[start, end)`` ranges, in the
    concatenation of the pieces, that count in norms and inner products: every parameter but those
    that another rank counts (replicated over tensor ranks, or the second copy of tied embeddings).
    """

    def __init__(self, trainable: Trainable) -> None:
        model = trainable.model
        assert not model.expert_parallel_buffers, "expert parameters need their own groups"
        self.pieces: list[Tensor] = []
        self.segments: list[tuple[int, int]] = []
        offset = 0
        for buffer in model.buffers:
            for index, bucket in enumerate(buffer.buckets):
                start, end = self._owned(model, bucket.grad_data.numel())
                self.pieces.append(bucket.grad_data[start:end])
                for param, (first, last, bucket_index) in buffer.param_index_map.items():
                    if bucket_index == index and _counts(param):
                        # From buffer to bucket to shard coordinates, cut to the shard.
                        low = max(first - bucket.offset, start)
                        high = min(last - bucket.offset, end)
                        if low < high:
                            self.segments.append((low - start + offset, high - start + offset))
                offset += end - start
        self.segments = _merge(sorted(self.segments))
        self.numel = offset

    @staticmethod
    def _owned(model: object, numel: int) -> tuple[int, int]:
        if not model.ddp_config.use_distributed_optimizer:  # type: ignore[attr-defined]
            return 0, numel
        group = parallel_state.get_data_parallel_group(with_context_parallel=True)
        size = numel // group.size()
        return group.rank() * size, (group.rank() + 1) * size

    def empty_row(self, index: int) -> list[Tensor]:
        """Row ``index`` of the same shapes, uninitialised; see ``_beside``."""
        return [_beside(piece, index) for piece in self.pieces]


def _beside(piece: Tensor, index: int) -> Tensor:
    """Memory for a copy of ``piece``, placed for rows that are read side by side.

    At the same place relative to 16-byte borders: shards start wherever Megatron cuts its buckets, and
    rows that differ in that are read element by element on a GPU. At another place of a page than other
    rows: large allocations all begin at the same one, and their elements would compete for the same
    sets of a CPU's first cache (8 rows then take up to 1.2 times as long).
    """
    offset = (piece.data_ptr() % 16 + index * _STAGGER) // piece.element_size()
    return piece.new_empty(piece.numel() + offset)[offset:]


def _counts(param: torch.nn.Parameter) -> bool:
    return bool(param_is_not_shared(param) and param_is_not_tensor_parallel_duplicate(param))


def _merge(segments: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    merged: list[tuple[int, int]] = []
    for start, end in segments:
        if merged and merged[-1][1] == start:
            merged[-1] = (merged[-1][0], end)
        else:
            merged.append((start, end))
    return merged


class SeparatePasses:
    """One forward and backward per objective; works in every layout."""

    def __init__(
        self, trainable: Trainable, groups: Groups, objectives: int, vocabulary: int, micro_batch: int
    ) -> None:
        self._trainable = trainable
        self._groups = groups
        self._vocabulary = vocabulary
        self._micro_batch = micro_batch
        self.shard = GradientShard(trainable)
        self._rows = [self.shard.empty_row(i) for i in range(1, objectives)] + [self.shard.pieces]
        # Data ranks hold different shards with the distributed optimizer and the same gradient
        # without it: Megatron's own group for gradient norms tells which ranks to add up.
        optimizers = trainable.optimizer.chained_optimizers
        assert len(optimizers) == 1, "parameters of several optimizers would need several sums"
        self._group = optimizers[0].get_grad_stats_parallel_group()
        assert self._group is not None
        self._identity_checked = False

    def step(self, minibatch: Experience, loss: PolicyLoss, aggregator: Aggregator) -> GradientReport:
        """Measure every objective's gradient, aggregate, and take one optimizer step."""
        clock = _Clock()
        losses = self._measure(minibatch, loss, clock)
        found = ops.aggregate_(self.shard.pieces, self._rows, self.shard.segments, self._group, aggregator)
        gram, weights = found.gram.cpu(), found.weights.cpu()
        clock.lap("aggregate")
        status = int(found.status)
        # A NaN or Inf anywhere in a gradient makes its own squared norm NaN or Inf.
        nonfinite = [i for i, square in enumerate(gram.diagonal()) if not math.isfinite(square)]
        if nonfinite or status == ops.Status.NOT_CONVERGED:
            self._trainable.zero_grad()
            return self._report(losses, gram, torch.zeros(len(gram)), 0.0, clock, nonfinite=nonfinite)
        if status != ops.Status.OK:
            self._trainable.zero_grad()
            aggregator(gram)  # says on the host, in words, what the status counts
            raise RuntimeError(f"no weights on the device: {ops.Status(status).name}")
        if not self._identity_checked:
            self._identity_checked = self._check_identity(gram, weights)
            clock.lap("check")
        learning_rate = self._trainable.optimizer.param_groups[0]["lr"]
        updated, norm, _ = self._trainable.optimizer.step()
        assert updated, "the Gram matrix was finite and the combined gradient is not"
        self._trainable.scheduler.step(1)
        clock.lap("optimizer")
        return self._report(losses, gram, weights, float(norm), clock, learning_rate=learning_rate)

    def _measure(self, minibatch: Experience, loss: PolicyLoss, clock: _Clock) -> list[float]:
        """Every objective's reduced gradient into its row; the losses, as global token means."""
        microbatches = minibatch.split(self._micro_batch)
        tokens = self._groups.sum_over_data(minibatch.response_mask_BT.sum())
        parts: list[Tensor] = []
        last = len(self._rows) - 1
        for index, row in enumerate(self._rows):
            self._trainable.zero_grad()

            def mean_loss(logits_BTV: Tensor, batch: Experience, index: int = index) -> Tensor:
                logprobs_BT = response_logprobs(
                    logits_BTV, batch.tokens_BT, batch.response_mask_BT, self._vocabulary
                )
                # By the global count: sequences of all ranks and microbatches weigh by their tokens.
                return loss(logprobs_BT, batch, index) / float(tokens)

            parts.append(
                forward_backward(self._trainable.model, microbatches, mean_loss, self._groups.layout.data)
            )
            if index != last:
                for kept, piece in zip(row, self.shard.pieces, strict=True):
                    kept.copy_(piece)
            clock.lap(f"forward_backward/{index}")
        local = self._groups.from_last_stage(torch.stack(parts))
        return [float(x) for x in self._groups.sum_over_data(local)]

    def _check_identity(self, gram: Tensor, weights: Tensor) -> bool:
        """``sqrt(w'Gw)`` must be Megatron's norm of the combined gradient, before anything is updated.

        False where every weighted gradient is zero, which proves nothing.
        """
        optimizer = self._trainable.optimizer
        optimizer.prepare_grads()
        measured = float(optimizer.get_grad_norm())
        predicted = math.sqrt(max(float(weights @ gram @ weights), 0.0))
        scale = float(weights.abs() @ gram.diagonal().sqrt())
        if not abs(measured - predicted) <= _IDENTITY_TOLERANCE * scale:
            raise RuntimeError(
                f"the Gram matrix predicts a combined gradient of norm {predicted:.9g} and Megatron "
                f"measures {measured:.9g}: this version of megatron-core lays its gradient buffers out "
                "in a way that gapo_mega does not know, training would be wrong"
            )
        return scale > 0

    def _report(
        self,
        losses: list[float],
        gram: Tensor,
        weights: Tensor,
        norm: float,
        clock: _Clock,
        nonfinite: Sequence[int] | None = None,
        learning_rate: float = 0.0,
    ) -> GradientReport:
        clip = self._trainable.optimizer.config.clip_grad
        return GradientReport(
            losses=losses,
            gram=gram,
            weights=weights,
            gradient_norm=norm,
            # Megatron's own formula, so that the log tells what it did.
            clip_factor=min(1.0, clip / (norm + 1e-6)) if clip > 0 else 1.0,
            learning_rate=learning_rate,
            skipped=nonfinite is not None,
            nonfinite=list(nonfinite or []),
            excluded=[i for i, square in enumerate(gram.diagonal()) if float(square) == 0.0],
            seconds=clock.seconds,
        )


class _Clock:
    """Wall time between laps; on a GPU each lap waits for the device."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        now = time.perf_counter()
        self.seconds[name] = self.seconds.get(name, 0.0) + now - self._last
        self._last = now
