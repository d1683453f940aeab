"""``store: shards`` with ``scope: full``: keeps every objective's gradient until the weights are known."""

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
        whole = gradients.store == cls.store and gradients.scope == "full"
        return whole and gradients.forward != "one_pass"

    def check(self) -> None:
        """Accept every setting."""

    def refusal_of_shared(self, microbatches: int, recompute: str) -> str | None:
        if microbatches > 1 and self.gradients.store_dtype == "bf16":
            rounded = "store_dtype bf16 (the sum over microbatches would be rounded every time)"
            return f"{microbatches} microbatches and {rounded}"
        return None

    @property
    def has_one_pass_form(self) -> bool:
        """Whole gradients are sums over microbatches, which bf16 would round every time."""
        return self.gradients.store_dtype == "fp32"

    @property
    def has_whole_rows(self) -> bool:
        return True

    @property
    def measures_change(self) -> bool:
        """Follows the setting; where that is none, true with the adam metric only."""
        asked = self.gradients.actual_change
        return self.gradients.metric == "adam" if asked is None else asked

    def passes(self, objectives: int, shared: bool) -> PassCount:
        return PassCount(1 if shared else objectives, objectives)

    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        """Bytes of the rows, and of the copy of the parameters that measures the optimizer's change."""
        item = 2 if self.gradients.store_dtype == "bf16" else FP32
        copy = sizes.shard * FP32 if self.measures_change else 0
        return (objectives - 1) * sizes.shard * item + copy
