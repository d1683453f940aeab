"""What a gradient strategy declares before anything is built: arithmetic, no device."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

FP32 = 4  # bytes of an element


class GradientSettings(Protocol):
    """The part of the section ``gradients`` (``config.sections.GradientConfig``) that declarations read."""

    @property
    def store(self) -> str: ...

    @property
    def store_dtype(self) -> str: ...

    @property
    def forward(self) -> str: ...

    @property
    def scope(self) -> str | list[list[int]]: ...

    @property
    def metric(self) -> str: ...

    @property
    def actual_change(self) -> bool | None: ...


@dataclass(frozen=True)
class PassCount:
    """Full forwards and backwards over a minibatch in one update."""

    forwards: int
    backwards: int


@dataclass(frozen=True)
class RankSizes:
    """Elements on one rank of a pipeline stage, from which the bytes of rows follow."""

    shard: int  # of the gradient that the rank owns
    whole: int  # of all its parameters, before they are shared out over data ranks
    layer: int  # of one transformer layer
    layers: Sequence[int]  # transformer layers of the stage, from 0 over all stages
    num_layers: int  # of the model
    output_layer: int  # 0 where the stage has none


@dataclass(frozen=True)
class Variant:
    """One way to run a strategy that ``gapo-mega benchmark step`` measures."""

    name: str
    gradients: Mapping[str, Any]  # settings of the section beside its defaults
    against_peers: bool = False  # benchmarks/peers.py measures it beside other libraries, too


class StrategyDeclaration(ABC):
    """A gradient strategy with the section ``gradients`` that chose it."""

    name: ClassVar[str]
    store: ClassVar[str]  # the value of ``gradients.store`` that it belongs to
    variants: ClassVar[Sequence[Variant]]
    # Whether all ranks of a pipeline stage hold as many bytes of rows as ``row_bytes`` says. False: some may
    # hold fewer.
    rows_are_even: ClassVar[bool] = True

    def __init__(self, gradients: GradientSettings) -> None:
        self.gradients = gradients

    @classmethod
    def chosen_by(cls, gradients: GradientSettings) -> bool:
        """Whether these settings ask for this strategy; every section asks for exactly one."""
        return gradients.store == cls.store

    @abstractmethod
    def check(self) -> None:
        """Raise a one-line ``ValueError`` for a setting that does not go with the strategy.

        Runs when the configuration is read.
        """

    def check_model(self, num_layers: int) -> None:  # noqa: B027 (most strategies fit every model)
        """Raise a one-line ``ValueError`` for a setting that a model of ``num_layers`` layers rules out."""

    @abstractmethod
    def refusal_of_shared(self, microbatches: int, recompute: str) -> str | None:
        """Why one forward per microbatch cannot serve all backwards, as words after "shared with"; else None.

        ``microbatches``: of a data-parallel rank's minibatch. ``recompute``: ``model.recompute``.
        """

    def reuses_graph(self, objectives: int) -> bool:
        """Whether the graph of a shared forward serves more than one backward, so that one must keep it."""
        return objectives > 1

    @property
    def has_one_pass_form(self) -> bool:
        """Whether ``forward: one_pass`` measures the same with these settings."""
        return False

    def refuse_one_pass(self) -> None:
        """Refuse ``forward: one_pass``, for strategies that do not keep whole gradients as rows."""
        if self.gradients.forward == "one_pass":
            raise ValueError(
                f"gradients.forward: found one_pass with store {self.gradients.store} and scope "
                f"{self.gradients.scope}, accepted: auto, shared, separate (one_pass is for whole gradients: "
                "store shards with scope full)"
            )

    @property
    def has_whole_rows(self) -> bool:
        """Whether all whole gradients are there when weights are found, so that running means can be kept."""
        return False

    @property
    def measures_change(self) -> bool:
        """Whether to measure the optimizer's actual change, as ``gradients.actual_change`` decides."""
        return False

    @abstractmethod
    def passes(self, objectives: int, shared: bool) -> PassCount:
        """Passes of one update, without a scope's partial backwards. ``shared``: one forward serves all."""

    @abstractmethod
    def row_bytes(self, objectives: int, sizes: RankSizes) -> int:
        """Bytes of rows on a rank beside Megatron's gradient buffer, which holds one gradient.

        ``rows_are_even`` tells whether every rank of a stage holds as many.
        """

    def average_bytes(self, objectives: int, sizes: RankSizes, dtype: str) -> int:
        """Bytes of the gradients' running means on a rank, one of its shard each; 0 where there are none."""
        return objectives * sizes.shard * (2 if dtype == "bf16" else FP32) if self.has_whole_rows else 0

    def refuse_bf16_rows(self) -> None:
        """Refuse bf16 rows, for strategies that do not keep whole gradients as rows."""
        if self.gradients.store_dtype == "bf16":
            raise ValueError(
                "gradients.store_dtype: found bf16, accepted: fp32 (bf16 is for the rows of store shards "
                "with scope full)"
            )

    def refuse_actual_change(self) -> None:
        """Refuse ``actual_change``, for strategies that lack some gradient when the optimizer has stepped."""
        if self.gradients.actual_change:
            raise ValueError(
                "gradients.actual_change: found true, accepted: false (it needs every gradient: store shards "
                "with scope full)"
            )
