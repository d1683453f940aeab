"""Finds what the files of a folder define: one file, one thing, nothing to register."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

T = TypeVar("T")


def implementations(package: ModuleType, base: type[T]) -> list[type[T]]:
    """Every concrete subclass of ``base`` that a file of ``package`` itself defines."""
    found: list[type[T]] = []
    for module_info in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if not isinstance(member, type) or not issubclass(member, base):
                continue
            if member.__module__ == module.__name__ and not inspect.isabstract(member):
                found.append(member)
    return found


def construct(section: str, known: Mapping[str, type[T]], name: str, options: Mapping[str, Any]) -> T:
    """``known[name](**options)``; ``ValueError`` for an unknown name or option, with the nearest one.

    ``section`` is the part of the configuration that the names come from.
    """
    if name not in known:
        raise ValueError(unknown(f"{section}.name", name, sorted(known)))
    accepted = list(inspect.signature(known[name]).parameters)
    for option in options:
        if option not in accepted:
            raise ValueError(unknown(f"{section}.options ({name})", option, accepted))
    return known[name](**options)


def unknown(where: str, found: str, accepted: Sequence[str]) -> str:
    """The message for a name that does not exist."""
    nearest = difflib.get_close_matches(str(found), accepted, n=1, cutoff=0.0)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{where}: found {found!r}{hint}, accepted: {', '.join(accepted)}"
