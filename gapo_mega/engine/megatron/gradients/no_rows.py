"""``gradients.store: single``: the Gram matrix from norms of sums, without keeping any row."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from gapo_mega import ops
from gapo_mega.config.strategies.no_rows import NoRows
from gapo_mega.engine.base import Aggregator
from gapo_mega.engine.megatron.gradients.metric import AdamMetric
from gapo_mega.engine.megatron.gradients.passes import Passes, Task, one_hot, passes_over
from gapo_mega.engine.megatron.gradients.update import Direction, GradientStrategy
from gapo_mega.engine.megatron.runtime.clock import Clock

_PARALLEL = 1e-7  # below the rounding of an fp32 gradient, two sets of coefficients are the same


class Single(GradientStrategy):
    """Measures M norms and M (M - 1) / 2 norms of pairs; a last pass forms the direction.

    The norm s of ``c_i g_i + c_j g_j`` with ``c = 1 / norm`` gives ``cos_ij = (s^2 - 2) / 2``. Without this
    scaling, sums of gradients of unequal norm would lose the cosine to cancellation. Every pass rounds anew,
    so the cosines have an absolute error of the gradients' own rounding (about 1e-6 in fp32, 1e-2 with bf16
    activations). If the weights are proportional to the pair measured last, as for two objectives under GAPO
    with p = 1, the buffer holds the direction already and the last pass is skipped.
    """

    declaration = NoRows
    row_bytes = 0

    def direction(self, task: Task, aggregator: Aggregator, clock: Clock) -> Direction:
        """Up to M (M + 1) / 2 passes, each with an all-reduce of one number, and one for the direction."""
        metric = self.metric()
        passes = passes_over(self.trainable, task, self.shared)
        if self.shared:
            clock.lap("forward")
        norms, held = self._norms(passes, metric, clock)
        if all(math.isfinite(norm) for norm in norms):
            cosines, held = self._cosines(passes, norms, held, metric, clock)
        else:
            cosines = torch.eye(self.objectives, dtype=torch.float64)
        scale = torch.tensor(norms, dtype=torch.float64)
        gram = self.agreed(nearest_gram(cosines) * scale[:, None] * scale[None, :])
        found = Direction.of(passes.losses, ops.solve(gram, aggregator))
        clock.lap("aggregate")
        if found.status == ops.Status.OK:
            self._leave(passes, found.weights.tolist(), held)
            clock.lap("direction")
        return found

    def _norms(
        self, passes: Passes, metric: AdamMetric | None, clock: Clock
    ) -> tuple[list[float], list[float]]:
        """Every gradient's norm, and the coefficients of the gradient left in the buffer."""
        norms = []
        held: list[float] = []
        for index in range(self.objectives):
            held = one_hot(index, self.objectives)
            passes.gradient(held)
            norms.append(math.sqrt(self._square(metric)))
            clock.lap(self.lap_of(index))
        return norms, held

    def _cosines(
        self,
        passes: Passes,
        norms: Sequence[float],
        held: list[float],
        metric: AdamMetric | None,
        clock: Clock,
    ) -> tuple[Tensor, list[float]]:
        """Cosines [M, M] of all pairs of nonzero gradients, and the coefficients of the last pair."""
        count = self.objectives
        cosines = torch.eye(count, dtype=torch.float64)
        for i in range(count):
            for j in range(i + 1, count):
                if norms[i] == 0.0 or norms[j] == 0.0:
                    continue
                held = [1.0 / norms[k] if k in (i, j) else 0.0 for k in range(count)]
                passes.gradient(held)
                cosine = (self._square(metric) - 2.0) / 2.0
                if math.isfinite(cosine):  # clamping would turn NaN into a conflict
                    cosine = min(1.0, max(-1.0, cosine))
                cosines[i, j] = cosines[j, i] = cosine
                clock.lap("pairs")
        return cosines, held

    def _square(self, metric: AdamMetric | None) -> float:
        """Squared norm of the buffer's gradient over all ranks, by an all-reduce."""
        return float(self.gram(self.shard, [self.shard.pieces], metric))

    def _leave(self, passes: Passes, weights: list[float], held: list[float]) -> None:
        """Leave the combined gradient in the buffer, by scaling or by one more pass."""
        ratio = proportion(weights, held)
        if ratio is None:
            passes.gradient(weights, last=True)
        else:
            ops.combine_(self.shard.pieces, [self.shard.pieces], [ratio])


def proportion(weights: Sequence[float], held: Sequence[float]) -> float | None:
    """``r`` with ``weights = r held`` to rounding, or None if there is none. All weights 0 give 0."""
    if not any(weights):
        return 0.0
    if any((w == 0.0) != (h == 0.0) for w, h in zip(weights, held, strict=True)):
        return None
    ratios = [w / h for w, h in zip(weights, held, strict=True) if h != 0.0]
    middle = sum(ratios) / len(ratios)
    if any(abs(ratio - middle) > _PARALLEL * abs(middle) for ratio in ratios):
        return None
    return middle


def nearest_gram(cosines: Tensor) -> Tensor:
    """The cosines, moved to a positive semidefinite matrix with a unit diagonal if they are not one.

    Rounding of separately measured cosines can give a matrix that no three or more vectors have. A
    minimum-norm point is defined for a positive semidefinite matrix only.
    """
    if not bool(cosines.isfinite().all()):
        return cosines
    values, vectors = torch.linalg.eigh(cosines)
    if float(values[0]) >= 0.0:
        return cosines
    fixed: Tensor = (vectors * values.clamp(min=0.0)) @ vectors.t()
    size = fixed.diagonal().sqrt()
    fixed = fixed / size[:, None] / size[None, :]
    return (fixed + fixed.t()) / 2
