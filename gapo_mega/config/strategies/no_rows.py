"""``store: single``: the Gram matrix from norms of gradients and of sums of two; no row is kept."""

from __future__ import annotations

from typing import ClassVar

from gapo_mega.config.strategies.base import PassCount, RankSizes, StrategyDeclaration, Variant


class NoRows(StrategyDeclaration):
    """m (m + 1) / 2 passes to measure, one more for the direction."""

    name: ClassVar[str] = "no_rows"
    store: ClassVar[str] = "single"
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("single", {"store": "single", "forward": "separate"}, against_peers=True),
        Variant("single, shared", {"store": "single", "forward": "shared"}),
    )

    def check(self) -> None:
        if self.gradients.scope != "full":
            raise ValueError(
                f"gradients.scope: found {self.gradients.scope} with store single, accepted: full (single "
                "measures sums of whole gradients)"
            )
        self.refuse_one_pass()
        self.refuse_bf16_rows()
        self.refuse_actual_change()

    def refusal_of_shared(self, microbatches: int, recompute: str) -> str | None:
        return None if microbatches == 1 else f"{microbatches} microbatches and store single"

    def passes(self, objectives: int, shared: bool) -> PassCount:
        """An upper bound: the engine skips the last pass where the last pair measured is the direction."""
        backwards = objectives * (objectives + 1) // 2 + (1 if objectives > 1 else 0)
        return PassCount(1 if shared else backwards, backwards)

    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        """Always 0: the strategy keeps no rows."""
        return 0
