"""The rollout back ends of this folder by name."""

from __future__ import annotations

import gapo_mega.rollout.backends as package
from gapo_mega.registry import find as find_named
from gapo_mega.registry import implementations
from gapo_mega.rollout.backends.base import RolloutBackend


def backends() -> dict[str, type[RolloutBackend]]:
    """Every concrete ``RolloutBackend`` that a file of this folder defines, by its ``name``."""
    return {backend.name: backend for backend in implementations(package, RolloutBackend)}


def find(name: str) -> type[RolloutBackend]:
    """The back end ``name``, or the user's own class.

    Raises ``ValueError`` for a name that does not exist, naming the nearest one and all that do.
    """
    return find_named("rollout.backend", backends(), RolloutBackend, name)
