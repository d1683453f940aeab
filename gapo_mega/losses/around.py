"""A loss that adds something to another one."""

from __future__ import annotations

from torch import Tensor

from gapo_mega.losses.base import PolicyLoss
from gapo_mega.losses.normalization import total
from gapo_mega.types import Experience


class Around(PolicyLoss):
    """Base of losses with another one inside: divided as that, and clipped where that is."""

    def __init__(self, loss: PolicyLoss) -> None:
        self.loss = loss
        self.normalization = loss.normalization

    def total(self, values_BT: Tensor, batch: Experience) -> Tensor:
        """What values of response tokens, 0 elsewhere, add to the sum that the inner loss returns."""
        return total(values_BT, batch.response_mask_BT, self.normalization)

    @property
    def clips(self) -> tuple[str, ...]:
        return self.loss.clips

    def clipped(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        return self.loss.clipped(logprobs_BT, batch, objective)
