"""The strategies of this folder, and the one that a section ``gradients`` asks for."""

from __future__ import annotations

from functools import cache

import gapo_mega.config.strategies as package
from gapo_mega.config.strategies.base import GradientSettings, StrategyDeclaration, Variant
from gapo_mega.registry import implementations


def declarations() -> tuple[type[StrategyDeclaration], ...]:
    """Every strategy that a file of this folder declares, in the order of the files' names."""
    return _declared_in(tuple(package.__path__))


@cache  # callers ask often, and every search of a folder reads it
def _declared_in(folders: tuple[str, ...]) -> tuple[type[StrategyDeclaration], ...]:
    return tuple(implementations(package, StrategyDeclaration))


def stores() -> list[str]:
    """The values of ``gradients.store`` that strategies belong to."""
    return list(dict.fromkeys(kind.store for kind in declarations()))


def variants() -> list[Variant]:
    """The variants of all strategies, which the benchmarks measure."""
    return [variant for kind in declarations() for variant in kind.variants]


def chosen(gradients: GradientSettings) -> StrategyDeclaration:
    """The strategy of these settings.

    Raises ``RuntimeError`` unless exactly one strategy declares that these settings ask for it.
    """
    found = [kind for kind in declarations() if kind.chosen_by(gradients)]
    if len(found) != 1:
        names = ", ".join(kind.name for kind in found) or "none"
        raise RuntimeError(f"gradients: chosen by {gradients!r}: {names}; exactly one strategy should be")
    return found[0](gradients)
