"""Batches of one objective in float64 for tests of policy losses, and NumPy's mean of values over them."""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapo_mega.losses import PolicyLoss
from gapo_mega.types import Experience

ROWS, COLUMNS = 6, 11

Array = NDArray[np.float64]


def policy_batch(seed: int, spread: float = 0.4, by_token: bool = True) -> tuple[Tensor, Experience]:
    """Log-probabilities that differ by ``spread`` from the old ones, and ragged responses, one of them empty.

    Advantages have either sign; without ``by_token`` they are numbers of responses.
    """
    generator = torch.Generator().manual_seed(seed)

    def normal(*size: int) -> Tensor:
        return torch.randn(*size, generator=generator, dtype=torch.float64)

    mask_BT = torch.zeros(ROWS, COLUMNS, dtype=torch.bool)
    for b in range(ROWS - 1):
        mask_BT[b, 1 + b % 3 : COLUMNS - b] = True
    logprobs_BT = -normal(ROWS, COLUMNS).abs() - 0.05
    advantages_BT = normal(ROWS, COLUMNS if by_token else 1).expand(ROWS, COLUMNS) * mask_BT
    empty_BT = torch.zeros(ROWS, COLUMNS, dtype=torch.float64)
    return logprobs_BT, Experience(
        tokens_BT=torch.zeros(ROWS, COLUMNS, dtype=torch.int64),
        response_mask_BT=mask_BT,
        group_B=torch.arange(ROWS) // 2,
        old_logprobs_BT=logprobs_BT - spread * normal(ROWS, COLUMNS),
        ref_logprobs_BT=empty_BT,
        scores_MB=torch.zeros(1, ROWS),
        token_rewards_MBT=empty_BT[None],
        advantages_MBT=advantages_BT[None],
    )


def arrays(logprobs_BT: Tensor, batch: Experience) -> tuple[Array, Array, list[list[int]]]:
    """Log-ratios and advantages ``[B, T]``, and the columns of each row's response."""
    assert batch.advantages_MBT is not None
    log_ratio_BT = (logprobs_BT - batch.old_logprobs_BT).numpy()
    columns = [mask_T.nonzero().flatten().tolist() for mask_T in batch.response_mask_BT]
    return log_ratio_BT, batch.advantages_MBT[0].numpy(), columns


def value_and_gradient(loss: PolicyLoss, logprobs_BT: Tensor, batch: Experience) -> tuple[float, Tensor]:
    leaf_BT = logprobs_BT.clone().requires_grad_()
    value = loss(leaf_BT, batch, 0)
    return float(value.detach()), torch.autograd.grad(value, leaf_BT)[0]
