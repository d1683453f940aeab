"""Finds the estimators of this folder by name: one file, one estimator, nothing to register."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from typing import Any

import gapo_mega.advantages as package
from gapo_mega.advantages.base import AdvantageEstimator


def estimators() -> dict[str, type[AdvantageEstimator]]:
    """Every concrete ``AdvantageEstimator`` that a file of this folder defines, by its ``name``."""
    found: dict[str, type[AdvantageEstimator]] = {}
    for module_info in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if not isinstance(member, type) or not issubclass(member, AdvantageEstimator):
                continue
            if member.__module__ == module.__name__ and not inspect.isabstract(member):
                found[member.name] = member
    return found


def build(name: str, **options: Any) -> AdvantageEstimator:
    """The estimator ``name`` with its options, e.g. ``build("gae", gamma=1.0, lam=0.95)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do) and for option values outside their range.
    """
    known = estimators()
    if name not in known:
        raise ValueError(_unknown("advantages.name", name, sorted(known)))
    accepted = list(inspect.signature(known[name]).parameters)
    for option in options:
        if option not in accepted:
            raise ValueError(_unknown(f"advantages.options ({name})", option, accepted))
    return known[name](**options)


def _unknown(where: str, found: str, accepted: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(str(found), accepted, n=1, cutoff=0.0)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{where}: found {found!r}{hint}, accepted: {', '.join(accepted)}"
