"""Finds what the files of a folder define: one file, one thing, nothing to register."""

from __future__ import annotations

import difflib
import importlib
import inspect
import pkgutil
from collections.abc import Mapping, Sequence
from types import ModuleType
from typing import Any, TypeVar

from gapo_mega.credentials import hidden, revealed
from gapo_mega.user_code import CLASS_FORMS, is_reference, is_subclass, load_class

T = TypeVar("T")


def implementations(package: ModuleType, base: type[T]) -> list[type[T]]:
    """Every concrete subclass of ``base`` that a file of ``package`` itself defines."""
    found: list[type[T]] = []
    for module_info in pkgutil.iter_modules(package.__path__, prefix=f"{package.__name__}."):
        module = importlib.import_module(module_info.name)
        for member in vars(module).values():
            if not is_subclass(member, base):
                continue
            if member.__module__ == module.__name__ and not inspect.isabstract(member):
                found.append(member)
    return found


def find(where: str, known: Mapping[str, type[T]], base: type[T], name: str) -> type[T]:
    """``known[name]``, or the user's own subclass of ``base``, named by ``module:Class`` or by its file.

    ``where`` is the setting that the name comes from. Raises ``ValueError`` for a name that does not exist,
    naming the nearest one, and as ``user_code.load_class`` does.
    """
    if is_reference(name):
        return load_class(where, name, base)
    if name not in known:
        raise ValueError(unknown(where, name, sorted(known), CLASS_FORMS))
    return known[name]


def construct(
    section: str, known: Mapping[str, type[T]], base: type[T], name: str, options: Mapping[str, Any]
) -> T:
    """Build what ``find`` gives for ``section.name`` with ``options``.

    ``section`` is the part of the configuration that the names come from. Raises ``ValueError`` for an
    unknown name or option, naming the nearest one, for an option that is missing, and for a wrong value.
    Options may name what they hold by ``env:NAME``, and secret ones by ``file:PATH``.
    """
    implementation = find(f"{section}.name", known, base, name)
    signature = inspect.signature(implementation)
    options = revealed(f"{section}.options", options)
    try:
        signature.bind(**options)
    except TypeError as error:
        accepted = list(signature.parameters)
        for option in options:
            if option not in accepted:
                raise ValueError(unknown(f"{section}.options ({name})", option, accepted)) from None
        raise ValueError(f"{section}.options ({name}): {error}") from None
    try:
        return implementation(**options)
    except ValueError as error:
        raise ValueError(hidden(f"{section}.options ({name}): {error}")) from error


def unknown(where: str, found: str, accepted: Sequence[str], forms: Sequence[str] = ()) -> str:
    """The message for a name that does not exist; ``forms`` are accepted too, but are no names."""
    nearest = difflib.get_close_matches(str(found), accepted, n=1, cutoff=0.0)
    hint = f" (did you mean {nearest[0]!r}?)" if nearest else ""
    return f"{where}: found {found!r}{hint}, accepted: {', '.join([*accepted, *forms]) or 'none'}"
