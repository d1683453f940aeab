"""The kinds of objective of this folder by name."""

from __future__ import annotations

import gapo_mega.objectives as package
from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import Objective, ObjectiveKind
from gapo_mega.registry import implementations, unknown


def kinds() -> dict[str, type[ObjectiveKind]]:
    """Every concrete ``ObjectiveKind`` that a file of this folder defines, by its ``kind``."""
    return {kind.kind: kind for kind in implementations(package, ObjectiveKind)}


def build(config: ObjectiveConfig) -> Objective:
    """The objective that ``config`` describes.

    Raises ``ValueError`` for a kind that does not exist (naming the nearest one and all that do)
    and for whatever the kind itself refuses.
    """
    known = kinds()
    if config.kind not in known:
        raise ValueError(unknown(f"objective {config.name!r}: kind", config.kind, sorted(known)))
    return known[config.kind](config)
