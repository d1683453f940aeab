"""Rollout back ends: where the responses of a training come from; one file each."""

from gapo_mega.rollout.backends.base import Asked, Policy, RolloutBackend
from gapo_mega.rollout.backends.registry import backends, check, check_here, find

__all__ = ["Asked", "Policy", "RolloutBackend", "backends", "check", "check_here", "find"]
