"""How a model is spread over ranks, and how long they wait for one another."""

from __future__ import annotations

from datetime import timedelta

from pydantic import Field, model_validator

from gapo_mega.config.fields import Section

MOST_MINUTES = 10_080  # a week; in milliseconds, torch's store takes 31 bits


class ParallelConfig(Section):
    """How the model is spread over ranks; data parallelism takes what is left of the world."""

    tensor: int = Field(1, ge=1, description="ranks that share every layer; divides the attention heads")
    pipeline: int = Field(1, ge=1, description="stages that share the layers; divides their number")
    sequence_parallel: bool = Field(False, description="needs tensor > 1")
    virtual_pipeline: int = Field(
        1,
        ge=1,
        description="parts of every stage's layers, which microbatches pass one after the other (interleaved "
        "schedule: less idling, more messages); needs pipeline > 1",
    )
    context: int = Field(
        1,
        ge=1,
        description="ranks that share every sequence: its positions are split over them, and so are the "
        "activations; they hold the same weights",
    )
    expert: int = Field(
        1,
        ge=1,
        description="ranks that share the experts of a layer; divides their number; with expert_tensor it "
        "divides the ranks of a stage, tensor x data",
    )
    expert_tensor: int | None = Field(
        None, ge=1, description="ranks that share every expert; none: as many as tensor"
    )
    distributed_optimizer_instances: int = Field(
        1,
        ge=1,
        description="copies of the optimizer's state, each split over as many of the data ranks: they gather "
        "parameters among themselves, and gradients are also reduced over the copies; needs "
        "optimizer.distributed without overlap_grad_reduce, divides the data ranks",
    )
    timeout_minutes: float = Field(
        30,
        ge=0.1,
        le=MOST_MINUTES,
        description="longest wait of a rank for others in a collective; what one rank does while others "
        "wait, such as scoring its responses, must take less",
    )
    silence_minutes: float = Field(
        5,
        ge=0.1,
        le=MOST_MINUTES,
        description="ranks that give no sign of life for so long are lost, and all others end; at most "
        "timeout_minutes counts",
    )

    phase_minutes: float | None = Field(
        240,
        ge=0.1,
        le=MOST_MINUTES,
        description="a rank that does not get on for so long (no token, microbatch or end of a phase) ends, "
        "also where all hang at once; none: no limit; not below timeout_minutes",
    )

    @property
    def timeout(self) -> timedelta:
        """Longest wait for other ranks."""
        return timedelta(minutes=self.timeout_minutes)

    @property
    def phase(self) -> timedelta | None:
        """How long a rank may stay where it is; None: for ever."""
        return None if self.phase_minutes is None else timedelta(minutes=self.phase_minutes)

    @property
    def silence(self) -> timedelta:
        """How long a rank may be silent."""
        return timedelta(minutes=min(self.silence_minutes, self.timeout_minutes))

    @model_validator(mode="after")
    def _refuse_untested(self) -> ParallelConfig:
        if self.context > 1:
            self._refuse_beside_context()
        if self.expert == 1 and self.experts_split != self.tensor:
            raise ValueError(
                f"parallel.expert_tensor: found {self.expert_tensor} with parallel.expert 1, accepted: null "
                f"or parallel.tensor ({self.tensor}); other splits need parallel.expert > 1"
            )
        if self.sequence_parallel and self.tensor == 1:
            raise ValueError(
                "parallel.sequence_parallel: found true with parallel.tensor 1; it needs tensor >= 2"
            )
        if self.virtual_pipeline > 1 and self.pipeline == 1:
            raise ValueError(
                f"parallel.virtual_pipeline: found {self.virtual_pipeline} with parallel.pipeline 1; it "
                "needs pipeline >= 2"
            )
        return self

    def _refuse_beside_context(self) -> None:
        others = {
            "expert": self.expert,
            "distributed_optimizer_instances": self.distributed_optimizer_instances,
        }
        for name, found in others.items():
            if found > 1:
                raise ValueError(
                    f"parallel.context: found {self.context} with parallel.{name} {found}, accepted: 1 (the "
                    "two have not been tried together)"
                )

    @model_validator(mode="after")
    def _lets_ranks_wait(self) -> ParallelConfig:
        """A rank that waits in a collective does not get on: the limit of that comes first."""
        if self.phase_minutes is not None and self.phase_minutes < self.timeout_minutes:
            raise ValueError(
                f"parallel.phase_minutes: found {self.phase_minutes:g}, accepted: at least "
                f"parallel.timeout_minutes ({self.timeout_minutes:g}), or null"
            )
        return self

    @property
    def experts_split(self) -> int:
        """Ranks that share every expert."""
        return self.tensor if self.expert_tensor is None else self.expert_tensor

    @property
    def sharing(self) -> int:
        """Neighbouring ranks of a stage that together hold its experts once."""
        return self.expert * self.experts_split

    @property
    def in_step(self) -> bool:
        """Whether data ranks share experts: they exchange tokens in every forward and backward."""
        return self.tensor % self.sharing != 0

    def of_dense(self) -> ParallelConfig:
        """The layout of a model without experts on the same ranks."""
        return self.model_copy(update={"expert": 1, "expert_tensor": None})
