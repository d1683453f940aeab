"""Losses as sums over response tokens, which the engine divides as their ``normalization`` says.

``build("ppo", clip_epsilon=0.1)(logprobs_BT, batch, objective)`` is the policy's loss. Every file of this
folder that defines a ``PolicyLoss`` is one; see docs/extending.md. The critic's loss and that of preference
pairs are functions.
"""

from gapo_mega.losses.base import PolicyLoss
from gapo_mega.losses.ppo import Ppo
from gapo_mega.losses.registry import build, losses
from gapo_mega.losses.value import value_loss_sum

__all__ = ["PolicyLoss", "Ppo", "build", "losses", "value_loss_sum"]
