"""The kinds of objective of this folder by name."""

from __future__ import annotations

from collections.abc import Sequence

import gapo_mega.objectives as package
from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import Objective, ObjectiveKind, SharedCall
from gapo_mega.registry import find, implementations


def kinds() -> dict[str, type[ObjectiveKind]]:
    """Every concrete ``ObjectiveKind`` that a file of this folder defines, by its ``kind``."""
    return {kind.kind: kind for kind in implementations(package, ObjectiveKind)}


def build(config: ObjectiveConfig) -> Objective:
    """The objective that ``config`` describes; its kind may be the user's own.

    Raises ``ValueError`` for a kind that does not exist (naming the nearest one and all that do)
    and for whatever the kind itself refuses.
    """
    return _kind(config)(config)


def build_all(configs: Sequence[ObjectiveConfig], *, outlines: bool = False) -> list[Objective]:
    """Every objective of a run. Those that differ in name, ``output`` and ``clip`` only share one call.

    ``outlines``: for a plan, which scores nothing: a model that has a card need not be here. Errors as
    :func:`build`.
    """
    calls: list[tuple[ObjectiveConfig, SharedCall]] = []
    built: list[Objective] = []
    for config in configs:
        if outlines:
            built.append(_kind(config).outline(config))
            continue
        objective = _kind(config)(config)
        if config.output is not None:
            same = config.model_copy(update={"name": "", "output": None, "clip": None})
            call = next((call for known, call in calls if known == same), None)
            if call is None:
                call = SharedCall()
                calls.append((same, call))
            objective.share(call)
        built.append(objective)
    return built


def _kind(config: ObjectiveConfig) -> type[ObjectiveKind]:
    return find(f"objective {config.name!r}: kind", kinds(), ObjectiveKind, config.kind)
