"""The scalarizers of this folder by name."""

from __future__ import annotations

from typing import Any

import gapo_mega.scalarization as package
from gapo_mega.registry import construct, implementations
from gapo_mega.scalarization.base import Scalarizer


def scalarizers() -> dict[str, type[Scalarizer]]:
    """Every concrete ``Scalarizer`` that a file of this folder defines, by its ``name``."""
    return {scalarizer.name: scalarizer for scalarizer in implementations(package, Scalarizer)}


def build(name: str, **options: Any) -> Scalarizer:
    """The scalarizer ``name``, or the user's own, with its options, e.g. ``build("rvpo", k=2.0)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do) and for option values outside their range.
    """
    return construct("scalarization", scalarizers(), Scalarizer, name, options)
