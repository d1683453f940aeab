"""The scalarizers of this folder by name."""

from __future__ import annotations

from typing import Any

import gapo_mega.scalarization as package
from gapo_mega.registry import construct, find, implementations
from gapo_mega.scalarization.base import Scalarizer, Weighted


def scalarizers() -> dict[str, type[Scalarizer]]:
    """Every concrete ``Scalarizer`` that a file of this folder defines, by its ``name``."""
    return {scalarizer.name: scalarizer for scalarizer in implementations(package, Scalarizer)}


def build(name: str, **options: Any) -> Scalarizer:
    """The scalarizer ``name``, or the user's own, with its options, e.g. ``build("rvpo", k=2.0)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do), for option values outside their range, and for ``safe`` without weights to start from.
    """
    known = scalarizers()
    if options.get("safe") is True and not issubclass(
        find("scalarization.name", known, Scalarizer, name), Weighted
    ):
        weighted = sorted(name for name, scalarizer in known.items() if issubclass(scalarizer, Weighted))
        raise ValueError(
            f"scalarization.options.safe: found true with {name}, which gives no weights of gradients to "
            f"start from; accepted: with {', '.join(weighted)}, or in place of it aggregation.name "
            "weighted_sum with options safe and advantages.name grpo (scores normalized in every group)"
        )
    return construct("scalarization", known, Scalarizer, name, options)
