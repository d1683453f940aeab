"""The methods of this folder by name."""

from __future__ import annotations

from typing import Any

import gapo_mega.aggregation as package
from gapo_mega.aggregation.base import Aggregator
from gapo_mega.registry import construct, implementations


def methods() -> dict[str, type[Aggregator]]:
    """Every concrete ``Aggregator`` that a file of this folder defines, by its ``name``."""
    return {method.name: method for method in implementations(package, Aggregator)}


def build(name: str, **options: Any) -> Aggregator:
    """The method ``name``, or the user's own, with its options, e.g. ``build("gapo", p=2)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do) and for option values outside their range.
    """
    return construct("aggregation", methods(), Aggregator, name, options)
