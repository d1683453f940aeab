"""``forward: one_pass``: all gradients from one pass, where a direction a sequence serves all objectives."""

from __future__ import annotations

from typing import ClassVar

from gapo_mega.config.strategies.base import FP32, GradientSettings, PassCount, RankSizes, Variant
from gapo_mega.config.strategies.kept_rows import KeptRows


class OnePassRows(KeptRows):
    """m - 1 rows of all parameters of this rank; the last gradient lies in Megatron's buffer."""

    name: ClassVar[str] = "one_pass"
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("one_pass", {"forward": "one_pass"}, against_peers=True),
    )

    @classmethod
    def chosen_by(cls, gradients: GradientSettings) -> bool:
        whole = gradients.store == cls.store and gradients.scope == "full"
        return whole and gradients.forward == "one_pass"

    def check(self) -> None:
        if self.gradients.store_dtype == "bf16":
            raise ValueError(
                "gradients.store_dtype: found bf16 with forward one_pass, accepted: fp32 (the sum over "
                "microbatches would be rounded every time)"
            )

    def passes(self, objectives: int, shared: bool) -> PassCount:
        """With one direction a sequence; every further one takes another backward, up to one an objective."""
        return PassCount(1, 1)

    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        """Bytes of rows before the reduction, and of the copy that measures the optimizer's change."""
        copy = sizes.shard * FP32 if self.measures_change else 0
        return (objectives - 1) * sizes.whole * FP32 + copy
