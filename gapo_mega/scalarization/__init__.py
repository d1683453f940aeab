"""Scalarizers: what makes one training signal of several objectives' scores, before any gradient.

``build("gdpo", variant="verl")(scores_MB, group_B, lengths_B)`` gives one number a response. Every file of
this folder that defines a ``Scalarizer`` is one; see docs/extending.md.
"""

from gapo_mega.scalarization.base import Scalarizer, Weighted
from gapo_mega.scalarization.registry import build, scalarizers

__all__ = ["Scalarizer", "Weighted", "build", "scalarizers"]
