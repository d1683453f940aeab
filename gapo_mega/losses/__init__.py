"""Losses as sums over response tokens; the engine divides by the global number of tokens."""

from gapo_mega.losses.ppo import PolicyStatistics, policy_loss_of, policy_loss_sum, policy_statistics
from gapo_mega.losses.value import value_loss_sum

__all__ = ["PolicyStatistics", "policy_loss_of", "policy_loss_sum", "policy_statistics", "value_loss_sum"]
