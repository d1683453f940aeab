"""The rollout back ends of this folder by name."""

from __future__ import annotations

import gapo_mega.rollout.backends as package
from gapo_mega.config import Config
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


def check(config: Config) -> None:
    """Raise ``ValueError`` for settings that the configuration's back end cannot work with."""
    rollout = config.rollout
    backend = find(rollout.backend)
    backend.check(config)
    asks = backend.ask is not RolloutBackend.ask
    if backend.answers_beside != asks:
        has = "a method ask and not answers_beside" if asks else "answers_beside and no method ask"
        raise ValueError(
            f"rollout.backend: found {rollout.backend}, which has {has}; accepted: a class with both, or "
            "with neither"
        )
    if rollout.ahead and not backend.answers_beside:
        others = sorted(name for name, other in backends().items() if other.answers_beside)
        raise ValueError(
            f"rollout.ahead: found {rollout.ahead} with rollout.backend {rollout.backend}, accepted: 0 (it "
            f"answers in the processes that train; {', '.join(others)} has its own)"
        )


def check_here(config: Config) -> None:
    """Raise ``ValueError`` for what the configuration's back end needs and this machine has not."""
    find(config.rollout.backend).check_here(config)
