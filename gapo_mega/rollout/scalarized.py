"""What a scalarizer makes of a batch's scores: advantages of one signal, or weights for all gradients."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

import torch
from torch import Tensor

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.group import group_deviations
from gapo_mega.advantages.rewards import kl_returns, with_scores
from gapo_mega.engine.base import Ranks
from gapo_mega.rollout.whole_batch import whole_batch
from gapo_mega.scalarization.base import Scalarizer, Weighted
from gapo_mega.types import Experience


class Scalarized:
    """Estimates the advantages of a run with a scalarizer.

    Args:
        audited: also estimate those of every objective, as a run without a scalarizer would.
    """

    def __init__(
        self, engine: Ranks, scalarizer: Scalarizer, estimator: AdvantageEstimator, audited: bool
    ) -> None:
        self._engine = engine
        self._scalarizer = scalarizer
        self._estimator = estimator
        self._audited = audited

    @property
    def estimates(self) -> bool:
        """Whether the estimator makes the signal's advantages."""
        return self._scalarizer.gives == "rewards" or self._estimator.needs_values

    def __call__(self, experience: Experience) -> tuple[Experience, dict[str, float]]:
        """Advantages [1, B, T], or with audits those of the objectives before them [M + 1, B, T]; facts.

        Collective over the data-parallel ranks. Tells the scalarizer of the batch.
        """
        batch = whole_batch(self._engine, experience)
        whole = batch.scores_MB, batch.group_B, batch.lengths_B
        scalarizer, estimator = self._scalarizer, self._estimator
        own = None
        if self._audited or estimator.needs_values:
            own = estimator(experience)
        if estimator.needs_values:
            assert own is not None and isinstance(scalarizer, Weighted), "checked before the run"
            advantages_BT = _weighted(own, scalarizer.coefficients(*whole))
        else:
            numbers_B = scalarizer(*whole)[batch.own]
            advantages_BT = self._advantages(experience, numbers_B)
        facts = scalarizer.facts(*whole)
        scalarizer.commit(*whole)
        rows = [advantages_BT[None]]
        if own is not None and self._audited:
            assert own.advantages_MBT is not None
            rows.insert(0, own.advantages_MBT)
        returns_MBT = own.returns_MBT if own is not None else None
        return dataclasses.replace(experience, advantages_MBT=torch.cat(rows), returns_MBT=returns_MBT), facts

    def _advantages(self, experience: Experience, numbers_B: Tensor) -> Tensor:
        """Advantages [B, T] of one number a response."""
        if self._scalarizer.gives == "rewards":
            dtype = experience.scores_MB.dtype
            estimated = self._estimator(with_scores(experience, numbers_B[None].to(dtype)))
            assert estimated.advantages_MBT is not None
            return estimated.advantages_MBT[0]
        kl_1B = kl_returns(experience)[:1]
        numbers_B = numbers_B + group_deviations(kl_1B, experience.group_B, "leave_one_out")[0]
        dtype = experience.token_rewards_MBT.dtype
        return torch.where(experience.response_mask_BT, numbers_B.to(dtype)[:, None], 0.0)


class Weighing:
    """Asks a safe scalarizer for the weights of the objectives' gradients in the updates on a rollout.

    Args:
        take: hears of the weights, float64 [M], the same on every rank.
    """

    def __init__(self, engine: Ranks, scalarizer: Weighted, take: Callable[[Tensor], None]) -> None:
        self._engine = engine
        self._scalarizer = scalarizer
        self._take = take

    def __call__(self, experience: Experience) -> dict[str, float]:
        """Facts for the log. Collective over the data-parallel ranks. Tells the scalarizer of the batch.

        Raises ``ValueError`` for weights that are not finite.
        """
        batch = whole_batch(self._engine, experience)
        whole = batch.scores_MB, batch.group_B, batch.lengths_B
        scalarizer = self._scalarizer
        weights_M = scalarizer.coefficients(*whole).double()
        if not bool(weights_M.isfinite().all()):
            raise ValueError(
                f"scalarization.name: found {scalarizer.name}, whose coefficients are {weights_M.tolist()} "
                "for this rollout, accepted: a scalarizer that gives a finite number an objective"
            )
        self._take(weights_M)
        facts = scalarizer.facts(*whole)
        scalarizer.commit(*whole)
        return facts


def _weighted(own: Experience, coefficients_M: Tensor) -> Tensor:
    """``sum_k c_k A_k`` [B, T]."""
    assert own.advantages_MBT is not None
    summed_BT = torch.einsum("m,mbt->bt", coefficients_M, own.advantages_MBT.double())
    return summed_BT.to(own.advantages_MBT.dtype)
