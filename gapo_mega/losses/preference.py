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


def dpo_losses(
    difference_P: Tensor, margin_P: Tensor, *, beta: float, weight: float = 1.0, label_smoothing: float = 0.0
) -> Tensor:
    """``-(1 - s) log sigmoid(z) - s log sigmoid(-z)`` of every pair, ``z = (beta d - margin) / weight``.

    DPO (Rafailov et al. 2023, eq. 7) where ``margin`` is 0 and ``weight`` 1; MODPO (Zhou et al. 2023,
    arXiv 2310.03708) otherwise. ``s`` is cDPO's ``label_smoothing``.

    Args:
        difference_P: ``d``, the log-ratio of policy and reference for the chosen response less that for the
            rejected one, in nats.
        margin_P: other objectives' rewards of the chosen response less those of the rejected one, weighted.
    """
    z_P = (beta * difference_P - margin_P) / weight
    return -(1 - label_smoothing) * logsigmoid(z_P) - label_smoothing * logsigmoid(-z_P)


def ipo_losses(difference_P: Tensor, *, beta: float) -> Tensor:
    """``(d - 1 / (2 beta))^2`` of every pair (Azar et al. 2023, arXiv 2310.12036, eq. 17)."""
    return (difference_P - 1 / (2 * beta)).square()
