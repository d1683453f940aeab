"""Rollout back ends: where the responses of a training come from; one file each."""

from gapo_mega.rollout.backends.base import Policy, RolloutBackend
from gapo_mega.rollout.backends.registry import backends, find

__all__ = ["Policy", "RolloutBackend", "backends", "find"]
