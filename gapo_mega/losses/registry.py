"""The policy losses of this folder by name."""

from __future__ import annotations

from typing import Any

import gapo_mega.losses as package
from gapo_mega.losses.base import PolicyLoss
from gapo_mega.registry import construct, implementations


def losses() -> dict[str, type[PolicyLoss]]:
    """Every concrete ``PolicyLoss`` that a file of this folder defines, by its ``name``."""
    return {loss.name: loss for loss in implementations(package, PolicyLoss)}


def build(name: str, **options: Any) -> PolicyLoss:
    """The loss ``name``, or the user's own, with its options, e.g. ``build("ppo", clip_epsilon=0.1)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do) and for option values outside their range.
    """
    return construct("loss", losses(), PolicyLoss, name, options)
