"""The loss of CISPO (MiniMax 2025, arXiv 2506.13585): the importance weight is clipped, not the token."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.losses.normalization import total
from gapo_mega.losses.ratio import Clipped, advantages_of, log_ratio_of, ratio_of
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class Cispo(Clipped):
    """``-sg(clip(rho, 1 - eps, 1 + eps_high)) A log pi``, where sg stops the gradient (eqs. 4 and 5).

    Every token keeps a gradient, that of REINFORCE with a bounded weight. A ``clip_epsilon`` of 1 is no lower
    bound, as in the paper. The paper does not say its upper one; a weight of at most 5 is that of ScaleRL
    (arXiv 2510.13786). Advantages of whole responses give cotangents that are multiples of one another,
    whatever is clipped: ``gradients.forward: one_pass`` always takes one pass.
    """

    name: ClassVar[str] = "cispo"
    stops_gradient: ClassVar[bool] = True

    clip_epsilon: float = 1.0
    clip_epsilon_high: float | None = 4.0

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        weight_BT = self._ratio(logprobs_BT, batch).clamp(*self.bounds)
        logprobs_BT = torch.where(batch.response_mask_BT, logprobs_BT, 0.0)
        loss_BT = -weight_BT * advantages_of(batch, objective) * logprobs_BT
        return total(loss_BT, batch.response_mask_BT, self.normalization)

    def clipped(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        """Where the weight is bounded, whatever sign the advantage has: such tokens keep a gradient."""
        (low, high), ratio_BT = self.bounds, self._ratio(logprobs_BT, batch)
        return torch.stack([ratio_BT < low, ratio_BT > high])

    @staticmethod
    def _ratio(logprobs_BT: Tensor, batch: Experience) -> Tensor:
        return ratio_of(log_ratio_of(logprobs_BT.detach(), batch))
