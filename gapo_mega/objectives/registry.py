"""Finds the kinds of objective of this folder: one file, one kind, nothing to register."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil

import gapo_mega.objectives as package
from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives.base import Objective, ObjectiveKind


def kinds() -> dict[str, type[ObjectiveKind]]:
    """Every concrete ``ObjectiveKind`` that a file of this folder defines, by its ``kind``."""
    found: dict[str, type[ObjectiveKind]] = {}
    for module_info in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if not isinstance(member, type) or not issubclass(member, ObjectiveKind):
                continue
            if member.__module__ == module.__name__ and not inspect.isabstract(member):
                found[member.kind] = member
    return found


def build(config: ObjectiveConfig) -> Objective:
    """The objective that ``config`` describes.

    Raises ``ValueError`` for a kind that does not exist (naming the nearest one and all that do)
    and for whatever the kind itself refuses.
    """
    known = kinds()
    if config.kind not in known:
        accepted = sorted(known)
        nearest = difflib.get_close_matches(config.kind, accepted, n=1, cutoff=0.0)
        hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
        raise ValueError(
            f"objective {config.name!r}: kind: found {config.kind!r}{hint}, accepted: {', '.join(accepted)}"
        )
    return known[config.kind](config)
