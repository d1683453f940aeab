"""The clipped value loss of PPO, for the values of one objective or of all at once."""

from __future__ import annotations

import torch
from torch import Tensor


def value_loss_sum(
    values_MBT: Tensor, old_values_MBT: Tensor, returns_MBT: Tensor, mask_BT: Tensor, value_clip: float
) -> Tensor:
    """Sum over objectives and response tokens of ``0.5 max((v - R)^2, (v_clip - R)^2)``.

    ``v_clip`` is ``v`` kept within ``value_clip`` of the value before the update. The values and returns
    are all [M, B, T], or all [B, T] of one objective. The result is a scalar with a graph to
    ``values_MBT``; positions where ``mask_BT`` (bool [B, T]) is False add exactly 0 to the loss and to
    the gradient, whatever they hold.
    """
    change_MBT = torch.where(mask_BT, values_MBT - old_values_MBT, 0.0)
    old_error_MBT = torch.where(mask_BT, old_values_MBT - returns_MBT, 0.0)
    error_MBT = old_error_MBT + change_MBT
    clipped_error_MBT = old_error_MBT + change_MBT.clamp(-value_clip, value_clip)
    return 0.5 * torch.maximum(error_MBT.square(), clipped_error_MBT.square()).sum()
