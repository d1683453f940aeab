"""The sections of the optimizer, and of the critic, which has one of its own."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, field_validator, model_validator
from pydantic_core import PydanticCustomError

from gapo_mega.config.fields import LocalPath, Section

SMALLEST_NORMAL = 1.1754943508222875e-38  # of float32; what is smaller may count as 0 there


class OptimizerConfig(Section):
    """Megatron's optimizer for one model."""

    name: Literal["adam", "sgd"] = Field("adam", description="adam is AdamW where weight_decay is not 0")
    lr: float = Field(1e-6, gt=0, description="largest learning rate, reached after the warm-up")
    min_lr: float = Field(0.0, ge=0, description="learning rate at the end of the schedule")
    schedule: Literal["constant", "linear", "cosine"] = Field("cosine", description="decay after the warm-up")
    warmup_fraction: float = Field(0.03, ge=0, lt=1, description="share of all steps that warm up")
    weight_decay: float = Field(0.0, ge=0, description="decoupled weight decay")
    beta1: float = Field(0.9, ge=0, lt=1, description="adam only: decay of the first moment")
    beta2: float = Field(0.95, ge=0, lt=1, description="adam only: decay of the second moment")
    eps: float = Field(1e-8, gt=0, description="adam only: added to the root of the second moment")
    momentum: float = Field(0.0, ge=0, lt=1, description="sgd only")
    clip_grad: float = Field(1.0, ge=0, description="norm to clip the combined gradient to; 0 turns it off")
    distributed: bool = Field(True, description="Megatron's distributed optimizer; adam only")
    overlap_grad_reduce: bool = Field(False, description="reduce gradients while the backward still runs")

    overlap_param_gather: bool = Field(
        False,
        description="gather stepped parameters while the next forward already runs; needs distributed and "
        "overlap_grad_reduce",
    )

    @field_validator("eps")
    @classmethod
    def _eps_is_not_0_in_float32(cls, eps: float) -> float:
        if eps < SMALLEST_NORMAL:
            raise PydanticCustomError("eps", "at least 1.18e-38, the smallest normal number of float32")
        return eps

    @model_validator(mode="after")
    def _gathers_what_is_split(self) -> OptimizerConfig:
        if self.overlap_param_gather and not (self.distributed and self.overlap_grad_reduce):
            lacking = "distributed" if not self.distributed else "overlap_grad_reduce"
            raise ValueError(
                f"optimizer.overlap_param_gather: found true with {lacking} false, accepted: false (it needs "
                "optimizer.distributed and optimizer.overlap_grad_reduce)"
            )
        return self

    @model_validator(mode="after")
    def _sgd_is_not_distributed(self) -> OptimizerConfig:
        if self.name == "sgd" and self.distributed:
            raise ValueError(
                "optimizer.distributed: found true with name sgd, accepted: false (Megatron's distributed "
                "optimizer is Adam only)"
            )
        return self


class CriticConfig(Section):
    """Value models, used when the advantage estimator needs them."""

    path: LocalPath | None = Field(
        None, description="Hugging Face directory of the backbone; none: the policy's"
    )
    heads: Literal["shared", "separate"] = Field("shared", description="one model with M heads, or M models")
    optimizer: OptimizerConfig = OptimizerConfig(lr=5e-7)
