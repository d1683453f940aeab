"""The kinds of objective of this folder by name."""

from __future__ import annotations

import gapo_mega.objectives as package
from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import Objective, ObjectiveKind
from gapo_mega.registry import find, implementations


def kinds() -> dict[str, type[ObjectiveKind]]:
    """Every concrete ``ObjectiveKind`` that a file of this folder defines, by its ``kind``."""
    return {kind.kind: kind for kind in implementations(package, ObjectiveKind)}


def build(config: ObjectiveConfig) -> Objective:
    """The objective that ``config`` describes; its kind may be the user's own.

    Raises ``ValueError`` for a kind that does not exist (naming the nearest one and all that do)
    and for whatever the kind itself refuses.
    """
    kind = find(f"objective {config.name!r}: kind", kinds(), ObjectiveKind, config.kind)
    return kind(config)
