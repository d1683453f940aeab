"""Finds the methods of this folder by name: one file, one method, nothing to register."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Sequence
from dataclasses import fields
from typing import Any

import gapo_mega.aggregation as package
from gapo_mega.aggregation.base import Aggregator


def methods() -> dict[str, type[Aggregator]]:
    """Every concrete ``Aggregator`` that a file of this folder defines, by its ``name``."""
    found: dict[str, type[Aggregator]] = {}
    for module_info in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if not isinstance(member, type) or not issubclass(member, Aggregator):
                continue
            if member.__module__ == module.__name__ and not inspect.isabstract(member):
                found[member.name] = member
    return found


def build(name: str, **options: Any) -> Aggregator:
    """The method ``name`` with its options, e.g. ``build("gapo", p=2)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do) and for option values outside their range.
    """
    known = methods()
    if name not in known:
        raise ValueError(_unknown("aggregation.name", name, sorted(known)))
    accepted = [field.name for field in fields(known[name])]
    for option in options:
        if option not in accepted:
            raise ValueError(_unknown(f"aggregation.options ({name})", option, accepted))
    return known[name](**options)


def _unknown(where: str, found: str, accepted: Sequence[str]) -> str:
    nearest = difflib.get_close_matches(str(found), accepted, n=1, cutoff=0.0)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{where}: found {found!r}{hint}, accepted: {', '.join(accepted)}"
