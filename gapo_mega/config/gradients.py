"""The section ``gradients``: the checks of a strategy are in the file of ``strategies/`` that declares it."""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, model_validator
from pydantic_core import PydanticKnownError

from gapo_mega.config import strategies
from gapo_mega.config.fields import Section

LayerRange = Annotated[list[int], Field(min_length=2, max_length=2)]  # [first, end)


def _declared(value: object) -> object:
    """Validate like a ``Literal`` of the declared strategies' values."""
    accepted = strategies.stores()
    if value not in accepted:
        *others, last = map(repr, accepted)
        raise PydanticKnownError("literal_error", {"expected": f"{', '.join(others)} or {last}"})
    return value


class GradientConfig(Section):
    """How per-objective gradients are measured, held and checked."""

    store: Annotated[str, BeforeValidator(_declared)] = Field(
        "shards",
        description="shards: one row of this rank's reduced shard per objective, the last in Megatron's own "
        "buffer; single: no row at all, m (m + 1) / 2 + 1 passes (one fewer where the last pair measured is "
        "the direction, as for two objectives with gapo and p = 1)",
    )
    store_dtype: Literal["fp32", "bf16"] = Field(
        "fp32", description="of the rows of store shards; bf16 halves them and rounds by up to 2^-9"
    )
    forward: Literal["auto", "one_pass", "shared", "separate"] = Field(
        "auto",
        description="one_pass: one forward and as many backwards as a sequence's cotangents have directions, "
        "one where every advantage is a number for a whole response; m - 1 rows of all parameters of a rank; "
        "shared: one forward per microbatch and a backward per objective through its graph, each "
        "reduced over the data ranks (no pipeline); separate: a forward and a backward per objective, "
        "reduced once a minibatch; auto: one_pass without a critic (with a pipeline: if a rollout has one "
        "update), else shared without a pipeline where it adds no communication (one microbatch, or one data "
        "rank), else separate",
    )
    scope: Literal["full", "last_layer", "last_block"] | list[LayerRange] = Field(
        "full",
        description="parameters that enter the inner products; the update is always of all. last_layer: the "
        "output layer (the paper's choice); last_block: with the last transformer layer; "
        "[[first, end], ...]: these transformer layers, from 0, end excluded",
    )
    metric: Literal["euclidean", "adam"] = Field(
        "euclidean",
        description="adam: inner products weighted by 1 / (sqrt(v) + eps), v Adam's bias-corrected second "
        "moment before the step; euclidean until the first step, and 0 where v still is 0",
    )
    actual_change: bool | None = Field(
        None,
        description="also log the inner product of every gradient with the change that the optimizer made to "
        "the parameters (a copy of this rank's parameters during the step); none: with metric adam only",
    )
    max_nonfinite_steps: int = Field(3, ge=1, description="stop after this many skipped steps in a row")
    audit_every: int = Field(
        0,
        ge=0,
        description="with a scalarizer: every such update also measures the gradient of each objective, "
        "which tells whom the step hurts and changes nothing of it (rows and passes of all objectives and "
        "one more); 0: never",
    )

    @model_validator(mode="after")
    def _fits_together(self) -> GradientConfig:
        strategies.chosen(self).check()
        return self
