"""From a batch's scores to the direction of a step, through the package's own parts.

Samples of all policies of all instances are one batch for the package's estimator, a prompt being a context
of one policy; scalarizers and aggregators, which see one policy's batch or Gram matrix, are asked one by one.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.testbed.methods import Method
from benchmarks.testbed.problem import Array
from benchmarks.testbed.start import Start
from gapo_mega import advantages, aggregation, ops, scalarization
from gapo_mega.advantages.group import group_deviations
from gapo_mega.aggregation.apart import Apart
from gapo_mega.aggregation.averaging import averaged_grams
from gapo_mega.scalarization import Weighted
from gapo_mega.types import Experience


@dataclass(frozen=True)
class Batch:
    """What N policies answered: R samples each, ``size`` of every context."""

    scores_NRM: Array
    kl_NR: Array  # log pi - log pi_0 of every sample
    slopes_NRD: Array  # the gradient of every sample's log pi
    size: int

    def by_objective(self) -> Tensor:
        """Scores [M, N R]."""
        return torch.from_numpy(np.moveaxis(self.scores_NRM, -1, 0).reshape(self.scores_NRM.shape[-1], -1))

    @property
    def groups(self) -> Tensor:
        """Which samples answer the same prompt [N R]."""
        return torch.arange(self.kl_NR.size) // self.size


class Signal:
    """The directions of N policies under one method, and all that the method remembers."""

    def __init__(
        self,
        method: Method,
        options: Sequence[dict[str, Any]],
        beta_N: Array,
        scales_M: Array,
        starts: Sequence[Start] | None,
        dimensions: int,
    ) -> None:
        """Build the method of every policy.

        ``options``: of every policy's method. ``beta_N``: what it takes for the weight of the KL.
        ``starts``: what every policy's method is told of the scores before training, if it is.
        """
        self._method, self._beta_N, self._scales_M = method, beta_N, scales_M
        self._estimator = advantages.build("grpo" if method.normalized else "rloo")
        self._updates = 0
        self._scalarizers: list[scalarization.Scalarizer] = []
        self._aggregators: list[aggregation.Aggregator] = []
        self._weighing: list[ops.AggregationMethod] = []
        for policy, (beta, chosen) in enumerate(zip(beta_N.tolist(), options, strict=True)):
            remembers: scalarization.Scalarizer | aggregation.Aggregator
            if method.of_gradients:
                remembers = aggregator = aggregation.build(method.name, **chosen)
                self._aggregators.append(aggregator)
                self._weighing.append(Apart(aggregator, _constant(beta)) if method.apart else aggregator)
            else:
                remembers = scalarizer = scalarization.build(method.name, **chosen)
                scalarizer.prepare([f"objective{i}" for i in range(len(scales_M))])
                self._scalarizers.append(scalarizer)
            if starts is not None:
                remembers.load_state_dict({"progress": dict(starts[policy])})
        rows = (len(scales_M) + method.apart) if method.average else 0
        self._means = torch.zeros(len(beta_N), rows, dimensions)

    def directions(self, batch: Batch, metric_ND: Array) -> Array:
        """Where every policy goes [N, D]: to be ascended. ``metric_ND``: Adam's, if they ask for it."""
        if not self._method.of_gradients:
            return self._rows(batch, self._scalarized(batch))[:, 0].double().numpy()
        for aggregator, scores_RM in zip(self._aggregators, batch.scores_NRM, strict=True):
            aggregator.observe(torch.from_numpy(scores_RM.mean(0)), torch.from_numpy(scores_RM.std(0)))
        rows_NMD = self._rows(batch, self._by_objective(batch))
        weights_NM = torch.stack(
            [self._weights(n, gram) for n, gram in enumerate(self._grams(rows_NMD, metric_ND))]
        )
        return torch.einsum("nm,nmd->nd", weights_NM, rows_NMD.double()).numpy()

    def _weights(self, policy: int, gram: Tensor) -> Tensor:
        found = self._weighing[policy].weigh_or_raise(gram)
        self._weighing[policy].commit(found)
        return found.weights

    def _grams(self, rows_NMD: Tensor, metric_ND: Array) -> Tensor:
        """What weights are found from [N, M, M]."""
        kept_NMD = rows_NMD if not self._method.average else torch.cat([self._means, rows_NMD], dim=1)
        both = kept_NMD.double()
        if self._method.metric == "adam":
            both = both * torch.from_numpy(metric_ND).sqrt()[:, None]
        if not self._method.average:
            return both @ both.mT
        _, grams = averaged_grams(both @ both.mT, self._method.average, self._updates)
        flat = self._means.view(-1)
        ops.combine_(flat, [flat, rows_NMD.reshape(-1)], [self._method.average, 1 - self._method.average])
        self._updates += 1
        return grams

    def _by_objective(self, batch: Batch) -> Tensor:
        """Advantages [M, N R] as the estimator gives them; with the KL apart, its own come last."""
        scores_MB, kl_B = batch.by_objective(), torch.from_numpy(batch.kl_NR.reshape(-1))
        if self._method.apart:
            made_MB = self._estimated(scores_MB, torch.zeros_like(scores_MB), batch)
            return torch.cat([made_MB, group_deviations(-kl_B[None], batch.groups, "leave_one_out")])
        # In the unit of each objective's score: J_i is E[u_i] - beta KL times the scale of that score. The
        # estimator that divides scores by their spread takes the KL as it is.
        units_M = torch.ones(len(scores_MB), dtype=torch.float64)
        if not self._method.normalized:
            units_M = torch.from_numpy(self._scales_M)
        weight_B = torch.from_numpy(np.repeat(self._beta_N, batch.kl_NR.shape[1]))
        return self._estimated(scores_MB, -units_M[:, None] * weight_B * kl_B, batch)

    def _estimated(self, scores_MB: Tensor, kl_rewards_MB: Tensor, batch: Batch) -> Tensor:
        """Advantages [M, B] by the package's estimator, of responses of one token."""
        nothing_B1 = torch.zeros(scores_MB.shape[1], 1)
        experience = Experience(
            tokens_BT=nothing_B1.long(),
            response_mask_BT=torch.ones_like(nothing_B1, dtype=torch.bool),
            group_B=batch.groups,
            old_logprobs_BT=nothing_B1,
            ref_logprobs_BT=nothing_B1,
            scores_MB=scores_MB,
            token_rewards_MBT=(scores_MB + kl_rewards_MB)[:, :, None],
        )
        made_MBT: Tensor | None = self._estimator(experience).advantages_MBT
        assert made_MBT is not None
        return made_MBT[:, :, 0]

    def _scalarized(self, batch: Batch) -> Tensor:
        """Advantages [1, N R] of one signal, as a run with a scalarizer has them."""
        count, samples = batch.kl_NR.shape
        group_R, lengths_R = batch.groups[:samples], torch.ones(samples, dtype=torch.int64)
        numbers, weights = [], torch.from_numpy(self._beta_N.copy())
        for n, scalarizer in enumerate(self._scalarizers):
            told = torch.from_numpy(batch.scores_NRM[n].T.copy()), group_R, lengths_R
            numbers.append(scalarizer(*told))
            if isinstance(scalarizer, Weighted):
                # sum_k c_k J_k: the KL has the weight that it has in the objectives.
                weights[n] *= scalarizer.coefficients(*told).double() @ torch.from_numpy(self._scales_M)
            scalarizer.commit(*told)
        numbers_1B = torch.cat(numbers)[None]
        kl_1B = -(weights[:, None] * torch.from_numpy(batch.kl_NR)).reshape(1, count * samples)
        if self._scalarizers[0].gives == "rewards":
            return self._estimated(numbers_1B, kl_1B, batch)
        return numbers_1B + group_deviations(kl_1B, batch.groups, "leave_one_out")

    def _rows(self, batch: Batch, advantages_MB: Tensor) -> Tensor:
        """Gradients [N, M, D] in fp32, as the engine has them."""
        count, samples = batch.kl_NR.shape
        shaped = advantages_MB.view(-1, count, samples).movedim(0, 1).to(torch.float32)
        summed: Tensor = torch.bmm(shaped, torch.from_numpy(batch.slopes_NRD).to(torch.float32))
        return summed / int(samples)


def _constant(value: float) -> Callable[[], float]:
    return lambda: value
