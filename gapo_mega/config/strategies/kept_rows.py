"""``store: shards`` with ``scope: full``: every objective's gradient is kept until the weights are known."""

from __future__ import annotations

from typing import ClassVar

from gapo_mega.config.strategies.base import (
    FP32,
    GradientSettings,
    PassCount,
    RankSizes,
    StrategyDeclaration,
    Variant,
)


class KeptRows(StrategyDeclaration):
    """m - 1 rows of this rank's shard; the last gradient lies in Megatron's buffer."""

    name: ClassVar[str] = "kept_rows"
    store: ClassVar[str] = "shards"
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("separate", {"forward": "separate"}, against_peers=True),
        Variant("shared", {"forward": "shared"}, against_peers=True),
        Variant("separate, bf16 rows", {"forward": "separate", "store_dtype": "bf16"}),
        Variant("separate, adam metric", {"forward": "separate", "metric": "adam"}),
    )

    @classmethod
    def chosen_by(cls, gradients: GradientSettings) -> bool:
        """See ``StrategyDeclaration.chosen_by``."""
        return gradients.store == cls.store and gradients.scope == "full"

    def check(self) -> None:
        """Every setting goes with it."""

    def refusal_of_shared(self, microbatches: int, recompute: str) -> str | None:
        """See ``StrategyDeclaration.refusal_of_shared``."""
        if microbatches > 1 and self.gradients.store_dtype == "bf16":
            rounded = "store_dtype bf16 (the sum over microbatches would be rounded every time)"
            return f"{microbatches} microbatches and {rounded}"
        return None

    @property
    def measures_change(self) -> bool:
        """As asked; on by itself with the adam metric."""
        asked = self.gradients.actual_change
        return self.gradients.metric == "adam" if asked is None else asked

    def passes(self, objectives: int, shared: bool) -> PassCount:
        """See ``StrategyDeclaration.passes``."""
        return PassCount(1 if shared else objectives, objectives)

    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        """With the copy of the parameters from which the optimizer's change is measured."""
        item = 2 if self.gradients.store_dtype == "bf16" else FP32
        copy = sizes.shard * FP32 if self.measures_change else 0
        return (objectives - 1) * sizes.shard * item + copy
