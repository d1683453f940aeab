"""The clipped policy loss of PPO (Schulman et al. 2017, eq. 7; GAPO paper, eqs. 15 and 16)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.losses.normalization import total
from gapo_mega.losses.ratio import Clipped, advantages_of, log_ratio_of, ratio_of
from gapo_mega.option_checks import require_number
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class Ppo(Clipped):
    """``-min(rho A, clip(rho, 1 - eps, 1 + eps_high) A)``, rho = pi / pi_old of a token.

    ``clip_epsilon`` is eps; ``clip_epsilon_high`` is eps_high, eps if there is none (DAPO's clip-higher,
    arXiv 2503.14476, eq. 10: 0.2 and 0.28). ``dual_clip``: c > 1 also bounds the loss where A < 0, by
    ``-c A`` whatever rho is (Ye et al. 2020, arXiv 1912.09729, eq. 5); none: no such bound.
    """

    name: ClassVar[str] = "ppo"

    dual_clip: float | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.dual_clip is not None:
            require_number("dual_clip", self.dual_clip, 1, above=True)

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        ratio_BT = ratio_of(log_ratio_of(logprobs_BT, batch))
        advantages_BT = advantages_of(batch, objective)
        loss_BT = self.surrogate(ratio_BT, advantages_BT)
        if self.dual_clip is not None:
            bounded_BT = torch.minimum(loss_BT, -self.dual_clip * advantages_BT)
            loss_BT = torch.where(advantages_BT < 0, bounded_BT, loss_BT)
        return total(loss_BT, batch.response_mask_BT, self.normalization)

    @property
    def clips(self) -> tuple[str, ...]:
        return super().clips if self.dual_clip is None else (*super().clips, "dual")

    def clipped(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        ratio_BT = ratio_of(log_ratio_of(logprobs_BT, batch))
        advantages_BT = advantages_of(batch, objective)
        held = self.held(ratio_BT, advantages_BT)
        if self.dual_clip is not None:
            held.append((ratio_BT > self.dual_clip) & (advantages_BT < 0))
        return torch.stack(held)
