"""``scope`` other than full: inner products over some parameters, the update of all."""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from gapo_mega.config.strategies.base import (
    FP32,
    GradientSettings,
    PassCount,
    RankSizes,
    StrategyDeclaration,
    Variant,
)

Ranges = list[list[int]]  # [first, end) of transformer layers, from 0


def layers_in(scope: str | Ranges, num_layers: int) -> Ranges:
    """The transformer layers in a scope other than full, of a model of ``num_layers``."""
    if not isinstance(scope, str):
        return scope
    return {"last_layer": [], "last_block": [[num_layers - 1, num_layers]]}[scope]


def has_output_layer(scope: str | Ranges) -> bool:
    """Whether the output layer is in a scope other than full."""
    return isinstance(scope, str)


class ScopedRows(StrategyDeclaration):
    """A row of the parameters in scope for every objective, then one backward of the weighted sum."""

    name: ClassVar[str] = "scoped_rows"
    store: ClassVar[str] = "shards"
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("last_layer", {"scope": "last_layer"}, against_peers=True),
        Variant("last_block", {"scope": "last_block"}),
    )
    rows_are_even: ClassVar[bool] = False  # one data rank may own all layers in scope

    @classmethod
    def chosen_by(cls, gradients: GradientSettings) -> bool:
        return gradients.store == cls.store and gradients.scope != "full"

    @property
    def has_layers(self) -> bool:
        """Whether any transformer layer is in scope."""
        return self.gradients.scope != "last_layer"

    def check(self) -> None:
        scope = self.gradients.scope
        self.refuse_one_pass()
        self.refuse_bf16_rows()
        if self.gradients.metric == "adam" and has_output_layer(scope):
            raise ValueError(
                f"gradients.metric: found adam with scope {scope}, accepted: euclidean (the output "
                "layer's gradient alone has no second moment: a tied one shares the embedding's)"
            )
        self.refuse_actual_change()
        if not isinstance(scope, str):
            _check_ranges(scope)

    def check_model(self, num_layers: int) -> None:
        scope = self.gradients.scope
        if not isinstance(scope, str) and scope[-1][1] > num_layers:
            raise ValueError(
                f"gradients.scope: found {scope}, accepted: ranges within the model's {num_layers} layers"
            )

    def refusal_of_shared(self, microbatches: int, recompute: str) -> str | None:
        if self.has_layers and recompute != "none":
            return f"model.recompute {recompute} (recomputed layers have no partial backward)"
        return None if microbatches == 1 else f"{microbatches} microbatches and scope {self.gradients.scope}"

    def reuses_graph(self, objectives: int) -> bool:
        """Layers in scope have their own backward before that of the weighted sum, even for one objective.

        The output layer needs none: its rows come from the logits.
        """
        return self.has_layers

    def passes(self, objectives: int, shared: bool) -> PassCount:
        measuring = has_output_layer(self.gradients.scope) + self.has_layers * objectives
        return PassCount(1 if shared else 1 + measuring, 1)

    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        """Bytes of the rank that owns the most of the layers in scope; the output layer has m rows."""
        ranges = layers_in(self.gradients.scope, sizes.num_layers)
        layers = sum(first <= layer < end for layer in sizes.layers for first, end in ranges)
        rows = (objectives - 1) * FP32 * min(sizes.shard, layers * sizes.layer)
        if has_output_layer(self.gradients.scope):
            rows += objectives * FP32 * sizes.output_layer
        return rows


def _check_ranges(ranges: Sequence[Sequence[int]]) -> None:
    ends = [0, *(end for _, end in ranges)]
    if not ranges or any(not before <= r[0] < r[1] for before, r in zip(ends, ranges, strict=False)):
        raise ValueError(
            f"gradients.scope: found {ranges}, accepted: pairs [first, end] in ascending order, each "
            "with 0 <= first < end"
        )
