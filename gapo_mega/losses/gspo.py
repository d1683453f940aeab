"""The loss of GSPO (Zheng et al. 2025, arXiv 2507.18071): one ratio for a whole response."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from gapo_mega.losses.normalization import Normalization, total
from gapo_mega.losses.ratio import Clipped, advantages_of, log_ratio_of, ratio_of
from gapo_mega.types import Experience


@dataclass(frozen=True, kw_only=True)
class Gspo(Clipped):
    """``-min(s A, clip(s, 1 - eps, 1 + eps_high) A)``, s the geometric mean of a response's ratios.

    ``s_i = exp(1 / |o_i| sum_t log(pi / pi_old))`` (eqs. 5 and 7). The ratios of long responses differ far
    less than those of tokens, so the defaults are the paper's, 3e-4 and 4e-4. Where advantages differ within
    a response, every token takes its own with the response's ratio.
    """

    name: ClassVar[str] = "gspo"

    clip_epsilon: float = 3e-4
    clip_epsilon_high: float | None = 4e-4
    normalization: Normalization = "sequence_mean"

    def __call__(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        loss_BT = self.surrogate(_sequence_ratio(logprobs_BT, batch), advantages_of(batch, objective))
        return total(loss_BT, batch.response_mask_BT, self.normalization)

    def clipped(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        return torch.stack(self.held(_sequence_ratio(logprobs_BT, batch), advantages_of(batch, objective)))


def _sequence_ratio(logprobs_BT: Tensor, batch: Experience) -> Tensor:
    """``s`` [B, 1]; 1 without a response token."""
    lengths_B = batch.response_mask_BT.sum(dim=1).clamp(min=1)
    return ratio_of(log_ratio_of(logprobs_BT, batch).sum(dim=1) / lengths_B)[:, None]
