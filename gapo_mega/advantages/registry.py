"""The estimators of this folder by name."""

from __future__ import annotations

from typing import Any

import gapo_mega.advantages as package
from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.registry import construct, implementations


def estimators() -> dict[str, type[AdvantageEstimator]]:
    """Every concrete ``AdvantageEstimator`` that a file of this folder defines, by its ``name``."""
    return {estimator.name: estimator for estimator in implementations(package, AdvantageEstimator)}


def build(name: str, **options: Any) -> AdvantageEstimator:
    """The estimator ``name``, or the user's own, with its options: ``build("gae", gamma=1.0, lam=0.95)``.

    Raises ``ValueError`` for a name or an option that does not exist (naming the nearest one and
    all that do) and for option values outside their range.
    """
    return construct("advantages", estimators(), AdvantageEstimator, name, options)
