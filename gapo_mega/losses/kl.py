"""Estimates of the divergence from the reference, per sampled token, and what their gradients are.

Let ``r = log pi(a) - log pi_ref(a)`` of a token a that pi has drawn (Schulman, *Approximating KL Divergence*,
2020). As a *value* the mean of k1 and of k3 is KL(pi || pi_ref), and that of k2 is near it where r is small.

In a *loss* only the gradient through log pi counts, and it is another question (Tang and Munos, arXiv
2506.09477; Liu et al., arXiv 2510.01555). With samples held fixed, in the mean over them,

=== ================ ============================== ======================================================
    value            gradient                       its mean
=== ================ ============================== ======================================================
k1  r                grad log pi                    0: noise alone, nothing holds pi near the reference
k2  r^2 / 2          r grad log pi                  that of KL(pi || pi_ref), as of the KL reward
k3  e^-r - 1 + r     (1 - e^-r) grad log pi         that of KL(pi_ref || pi), k2's to first order in r
=== ================ ============================== ======================================================

These hold for one token given those before it. A sum over the tokens of a response has the gradients of all
tokens' divergences at the contexts that were visited; that the policy may visit others later on, which the
KL reward counts, is left out. After the first update on a rollout the samples are the old policy's, and none
of the estimates is corrected for that, as in GRPO.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from gapo_mega.types import Experience

KlEstimator = Literal["k1", "k2", "k3"]

# exp(80) is about the largest number that float32 holds with room to spare: beyond it the estimate is as if
# the reference were no likelier than that.
_LARGEST = 80.0

_FORMULAS: dict[KlEstimator, Callable[[Tensor], Tensor]] = {
    "k1": lambda ratio: ratio,
    "k2": lambda ratio: ratio.square() / 2,
    "k3": lambda ratio: torch.expm1(-ratio) + ratio,
}


def kl_estimates(estimator: KlEstimator, logprobs_BT: Tensor, batch: Experience) -> Tensor:
    """The estimate at every response token [B, T] in nats, with a graph to ``logprobs_BT``; 0 off it."""
    # Masked before the exponential: afterwards 0 * inf would reach the gradient.
    ratio_BT = torch.where(batch.response_mask_BT, logprobs_BT - batch.ref_logprobs_BT, 0.0)
    return _FORMULAS[estimator](ratio_BT.clamp(min=-_LARGEST))
