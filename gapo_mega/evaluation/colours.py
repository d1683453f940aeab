"""Colours of pictures and pages."""

from __future__ import annotations

from collections.abc import Sequence

PALETTE = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
INK, MUTED, FAINT = "#1f2933", "#64707d", "#e4e8ec"
CONFLICT = "#D55E00"


def colour(index: int) -> str:
    """An objective's colour, the same in every picture."""
    return PALETTE[index % len(PALETTE)]


def row_colour(row: str, names: Sequence[str]) -> str:
    """The colour of a gradient: an objective's own, and a neutral one for a scalarizer's."""
    return colour(names.index(row)) if row in names else INK
