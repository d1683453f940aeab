"""Declarations of the gradient strategies, one file per strategy.

``chosen(gradients)`` is the strategy that a section ``gradients`` asks for. Every file of this folder that
defines a ``StrategyDeclaration`` declares one; ``engine/megatron/gradients/`` implements it. The folder lies
in this room because reading a configuration checks it against the declarations, and imports point down
(docs/adr/0007-strategies-declared-once.md).
"""

from gapo_mega.config.strategies.base import PassCount, RankSizes, StrategyDeclaration, Variant
from gapo_mega.config.strategies.registry import chosen, declarations, stores, variants

__all__ = [
    "PassCount",
    "RankSizes",
    "StrategyDeclaration",
    "Variant",
    "chosen",
    "declarations",
    "stores",
    "variants",
]
