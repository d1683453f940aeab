"""A new gradient strategy: the file that declares it, and the file that implements it."""

DECLARATION = '''
"""``store: sum_only``: not a method, but all that a method has to say."""

from typing import ClassVar

from gapo_mega.config.strategies.base import PassCount, RankSizes, StrategyDeclaration, Variant


class SumOnlyRows(StrategyDeclaration):
    """A row of eight bytes for every objective and layer."""

    name: ClassVar[str] = "sum_only"
    store: ClassVar[str] = "sum_only"
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("sum only", {"store": "sum_only", "forward": "separate"}, against_peers=True),
    )

    def check(self) -> None:
        self.refuse_bf16_rows()

    def check_model(self, num_layers: int) -> None:
        if num_layers > 40:
            raise ValueError(f"gradients.store: found sum_only with {num_layers} layers, accepted: up to 40")

    def refusal_of_shared(self, microbatches: int, recompute: str) -> str | None:
        return "store sum_only"

    def passes(self, objectives: int, shared: bool) -> PassCount:
        return PassCount(2, 2)

    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        return 8 * objectives * len(sizes.layers)
'''

IMPLEMENTATION = '''
"""The gradient of the plain sum; what it measures is made up."""

import torch

from gapo_mega import ops
from gapo_mega.config.strategies.sum_only import SumOnlyRows
from gapo_mega.engine.megatron.gradients.passes import SeparatePasses
from gapo_mega.engine.megatron.gradients.update import Direction, GradientStrategy


class SumOnly(GradientStrategy):
    """Weights of one."""

    declaration = SumOnlyRows

    def __init__(self, setting, declared):
        super().__init__(setting, declared)
        self._norms = torch.zeros(setting.objectives, setting.layers, dtype=torch.float64)

    @property
    def row_bytes(self):
        return self._norms.numel() * 8

    def direction(self, task, aggregator, clock):
        passes = SeparatePasses(self.trainable, task)
        passes.gradient([1.0] * self.objectives)
        gram = torch.eye(self.objectives, dtype=torch.float64)
        return Direction.of(passes.losses, ops.solve(gram, lambda gram: torch.ones(len(gram)).double()))
'''
