"""Weights of response tokens that were drawn from another distribution than the trainer's.

Let ``rho_t = pi_train(o_t) / pi_rollout(o_t)``, from the log-probabilities before the first update on a
rollout. The weight of a token is a factor of the advantages of *every* objective (and of the estimate of the
KL in a loss), so that all gradients, their Gram matrix and their combination are those of one estimator.

======== ============================================ =======================================================
kind     weight of token t                            source
======== ============================================ =======================================================
tis      min(rho_t, cap)                              truncated importance sampling (Ionides 2008; Yao et al.
                                                      2025, *Your efficient RL framework secretly brings you
                                                      off-policy RL training*)
mask     rho_t where low <= rho_t <= high, else 0     IcePop (Ling Team 2025, arXiv 2510.18855)
sequence the same of ``prod_t rho_t`` of the response sequence-level rejection (Liu et al. 2025, *When speed
                                                      kills stability*)
======== ============================================ =======================================================
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from gapo_mega.config import AlgorithmConfig
from gapo_mega.engine.base import Ranks

Kind = Literal["tis", "mask", "sequence"]

# exp(80) is about the largest ratio that float32 holds; every bound is far below it.
_LARGEST_LOG_RATIO = 80.0


@dataclass(frozen=True)
class Correction:
    """One kind with its bounds; ``cap`` is that of ``tis``, ``low`` and ``high`` those of the others."""

    kind: Kind
    cap: float = 2.0
    low: float = 0.5
    high: float = 5.0

    def weights(self, trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> Tensor:
        """Float32 [B, T] of both distributions' log-probabilities [B, T]; 0 off the response."""
        log_ratio_BT = log_ratio(trainer_BT, rollout_BT, mask_BT)
        if self.kind == "sequence":
            log_ratio_BT = log_ratio_BT.sum(dim=1, keepdim=True).expand_as(log_ratio_BT)
        ratio_BT = log_ratio_BT.clamp(max=_LARGEST_LOG_RATIO).exp()
        if self.kind == "tis":
            weights_BT = ratio_BT.clamp(max=self.cap)
        else:
            weights_BT = torch.where((ratio_BT >= self.low) & (ratio_BT <= self.high), ratio_BT, 0.0)
        return torch.where(mask_BT, weights_BT, 0.0).float()

    def facts(self, ranks: Ranks, weights_BT: Tensor, mask_BT: Tensor) -> dict[str, float]:
        """What the log takes of a step's weights. Collective over the data-parallel ranks.

        ``correction/weight``: mean of a response token; ``correction/held``: share of tokens whose weight is
        the cap (``tis``), or 0.
        """
        held_BT = weights_BT >= self.cap if self.kind == "tis" else weights_BT == 0
        sums = torch.stack(
            [weights_BT.double().sum(), (held_BT & mask_BT).sum().double(), mask_BT.sum().double()]
        )
        total, held, tokens = ranks.sum_over_data(sums).tolist()
        return {
            "correction/weight": total / max(tokens, 1.0),
            "correction/held": held / max(tokens, 1.0),
        }


def log_ratio(trainer_BT: Tensor, rollout_BT: Tensor, mask_BT: Tensor) -> Tensor:
    """``log pi_train - log pi_rollout`` float64 [B, T], 0 off the response."""
    return torch.where(mask_BT, trainer_BT.double() - rollout_BT.double(), 0.0)


def correction_of(algorithm: AlgorithmConfig, *, samples_policy: bool, exact: bool) -> Correction | None:
    """The correction of a run; None where every weight is 1.

    Args:
        samples_policy: responses come from the trained weights themselves, by the trainer's own arithmetic:
            ``auto`` is none.
        exact: they do so in fp32. The two distributions are one, and what differs is rounding: the weight
            is 1 whatever is asked for.
    """
    kind = algorithm.correction
    if kind == "auto":
        kind = "none" if samples_policy or algorithm.old_logprobs == "generator" else "tis"
    if kind == "none" or exact:
        return None
    low, high = algorithm.correction_range
    return Correction(kind, algorithm.correction_cap, low, high)
