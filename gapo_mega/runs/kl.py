"""Where the divergence from the reference counts: what ``algorithm.kl`` makes of the loss and the method."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from torch import Tensor

from gapo_mega.aggregation.apart import Apart
from gapo_mega.config import Config
from gapo_mega.losses.around import Around
from gapo_mega.losses.base import PolicyLoss
from gapo_mega.losses.kl import KlEstimator, kl_estimates
from gapo_mega.ops import AggregationMethod
from gapo_mega.rollout.kl import KlCoefficient
from gapo_mega.types import Experience


class _WithKl(Around):
    """A loss beside the estimate of the KL, which is divided as the loss is."""

    name = "with_kl"

    def __init__(self, loss: PolicyLoss, estimator: KlEstimator) -> None:
        super().__init__(loss)
        self._estimator = estimator

    def kl(self, logprobs_BT: Tensor, batch: Experience) -> Tensor:
        """The estimate over the responses, every token with the weight that its advantages have."""
        weights_BT = batch.correction_BT
        if weights_BT is None:
            return self.total(kl_estimates(self._estimator, logprobs_BT, batch), batch)
        # Left out before the estimate: 0 times an infinite one would reach the gradient.
        counted = replace(batch, response_mask_BT=batch.response_mask_BT & (weights_BT > 0))
        return self.total(kl_estimates(self._estimator, logprobs_BT, counted) * weights_BT, batch)


class KlInEveryLoss(_WithKl):
    """A loss and ``beta`` times the estimate of the KL, for every objective."""

    name = "kl_in_every_loss"

    def __init__(self, loss: PolicyLoss, estimator: KlEstimator, beta: Callable[[], float]) -> None:
        super().__init__(loss, estimator)
        self._beta = beta

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        value, beta = self.loss(logprobs_BT, batch, objective), self._beta()
        if beta == 0:  # 0 times the infinite divergence of a token that the reference rules out
            return value
        return value + beta * self.kl(logprobs_BT, batch)


class KlAsRow(_WithKl):
    """A loss of the objectives, and the estimate of the KL as that of the row after them."""

    name = "kl_as_row"

    def __init__(self, loss: PolicyLoss, estimator: KlEstimator, row: int) -> None:
        super().__init__(loss, estimator)
        self._row = row

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        if objective == self._row:
            return self.kl(logprobs_BT, batch)
        return self.loss(logprobs_BT, batch, objective)


def loss_with_kl(loss: PolicyLoss, config: Config, coefficient: KlCoefficient) -> PolicyLoss:
    """The loss of every row of an update, by ``algorithm.kl``."""
    algorithm = config.algorithm
    if algorithm.kl == "reward":
        return loss
    if algorithm.kl == "loss":
        return KlInEveryLoss(loss, algorithm.kl_estimator, lambda: coefficient.value)
    return KlAsRow(loss, algorithm.kl_estimator, len(config.objectives))


def method_with_kl(
    method: AggregationMethod, config: Config, coefficient: KlCoefficient
) -> AggregationMethod:
    """The method that weighs every row of an update, by ``algorithm.kl``."""
    return Apart(method, lambda: coefficient.value) if config.algorithm.kl == "apart" else method
