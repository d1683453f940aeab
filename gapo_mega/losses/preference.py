"""Losses of preference pairs."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import logsigmoid


def bradley_terry_sum(chosen_P: Tensor, rejected_P: Tensor, center: float = 0.0) -> Tensor:
    """Sum over pairs of ``-log sigmoid(chosen - rejected) + center ((chosen + rejected) / 2)^2``.

    The first term is the negative log-likelihood of the preferences in the model of Bradley and Terry
    (1952), which leaves the scores' mean open; the second one ties it to 0.
    """
    loss_P = -logsigmoid(chosen_P - rejected_P)
    if center:
        loss_P = loss_P + center * ((chosen_P + rejected_P) / 2).square()
    return loss_P.sum()
