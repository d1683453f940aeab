"""What the rest of the package sees of a training engine.

Everything below is implemented over Megatron-core in ``engine/megatron``; nothing here imports it.
All methods are collective: every rank of the world calls them, in the same order.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import Tensor

from gapo_mega.objectives.base import ScoreModelRequest, TokenScorer
from gapo_mega.types import Experience, Generation

# gram [M, M] float64 on the CPU -> weights [M] float64. See gapo_mega.aggregation. One that is a
# gapo_mega.ops.DeviceAggregator, too, is asked on the device.
Aggregator = Callable[[Tensor], Tensor]

# (logprobs_BT, microbatch, objective index) -> *sum* over response tokens of the loss (a scalar
# with a graph). The engine divides by the global number of response tokens of the minibatch.
PolicyLoss = Callable[[Tensor, Experience, int], Tensor]

# (values_BT of one objective, microbatch, objective index) -> *sum* over response tokens.
ValueLoss = Callable[[Tensor, Experience, int], Tensor]


@dataclass(frozen=True)
class Layout:
    """Where this process stands. Sizes and this process's index along every axis."""

    world: int
    rank: int
    tensor: int
    pipeline: int
    data: int
    data_rank: int
    tensor_rank: int
    pipeline_rank: int

    @property
    def is_main(self) -> bool:
        return self.rank == 0


@dataclass(frozen=True)
class GradientReport:
    """What one policy update measured; the same on every rank."""

    losses: list[float]  # per objective, global token mean
    gram: Tensor  # [M, M] float64, CPU
    weights: Tensor  # [M] float64, CPU
    gradient_norm: float  # Megatron's norm of the combined gradient, before clipping
    clip_factor: float  # 1 where nothing was clipped
    learning_rate: float
    skipped: bool = False  # True: a gradient was not finite, parameters untouched
    nonfinite: list[int] = field(default_factory=list)  # objectives with a non-finite gradient
    excluded: list[int] = field(default_factory=list)  # objectives with a zero gradient
    # <parameters before - after, g_k>: first-order gain of every objective by the change that the optimizer
    # really made, where measured; NaN where it cannot be told
    actual_change: list[float] | None = None
    seconds: dict[str, float] = field(default_factory=dict)  # forward_backward, aggregate, optimizer


@dataclass(frozen=True)
class SamplingParameters:
    """How tokens are drawn; ``temperature`` 0 is greedy."""

    max_new_tokens: int
    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    repetition_penalty: float = 1.0


class Generator(Protocol):
    """A rollout back end. ``generate`` is collective over the model-parallel ranks of a replica."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        """Responses for token-id prompts of different lengths. The same on every rank of a replica."""
        ...

    def update_weights(self) -> None:
        """Take the policy's current parameters. In-process back ends share them and do nothing."""
        ...


class Engine(Protocol):
    """Policy, reference and critic on this world of ranks."""

    layout: Layout

    @property
    def generator(self) -> Generator:
        """The rollout back end that samples from the current policy."""
        ...

    def logprobs(
        self, tokens_BT: Tensor, response_mask_BT: Tensor, model: Literal["policy", "reference"]
    ) -> Tensor:
        """Log-probabilities of the response tokens [B, T] float32, CPU, no graph; 0 elsewhere."""
        ...

    def values(self, tokens_BT: Tensor, response_mask_BT: Tensor) -> Tensor:
        """Critic values [M, B, T] float32, CPU: column t is the value *before* token t is drawn."""
        ...

    def score_model(self, request: ScoreModelRequest) -> TokenScorer:
        """A frozen score model in the policy's layout, as an objective asked for it.

        Raises ``ValueError`` where it is no score model, or does not fit the layout.
        """
        ...

    def update_policy(
        self, minibatch: Experience, loss: PolicyLoss, aggregator: Aggregator
    ) -> GradientReport:
        """One optimizer step on the aggregated gradient of all objectives."""
        ...

    def update_critic(self, minibatch: Experience, loss: ValueLoss) -> list[float]:
        """One optimizer step of the critic(s); the value loss per model, global token mean."""
        ...

    def peak_memory(self) -> int:
        """Largest number of bytes any rank has used so far: device memory, or resident on the CPU."""
        ...

    # -- communication: small tensors and Python objects -------------------------------------------
    def sum_over_data(self, tensor: Tensor) -> Tensor:
        """Sum of a CPU tensor over the data-parallel ranks; the same on every rank."""
        ...

    def gather_over_data(self, value: Any) -> list[Any]:
        """Picklable values of all data-parallel ranks in order, on every rank."""
        ...

    def broadcast_in_replica(self, value: Any) -> Any:
        """The value of the replica's first rank (tensor rank 0, pipeline rank 0)."""
        ...

    def barrier(self) -> None: ...

    # -- persistence -----------------------------------------------------------------------------
    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        """Models, optimizers, schedules and RNG states; ``extra`` is the trainer's own state."""
        ...

    def load(self, directory: Path) -> dict[str, Any]:
        """Inverse of ``save``; returns ``extra``."""
        ...

    def export_hf(self, directory: Path) -> None:
        """The policy as a Hugging Face directory that transformers loads."""
        ...

    def close(self) -> None: ...


class CheckpointConverter(Protocol):
    """Models between Hugging Face directories and the engine's checkpoints, one tensor at a time."""

    def to_checkpoint(
        self,
        source: Path,
        target: Path,
        *,
        tensor: int = 1,
        pipeline: int = 1,
        dtype: torch.dtype | None = None,
        overwrite: bool = False,
    ) -> None:
        """Write a Hugging Face directory as a checkpoint. Collective where torch.distributed runs.

        The parts of ``tensor`` x ``pipeline`` ranks are stored apart. ``dtype`` None: as in the source.
        Raises ``ValueError`` for a model or a target that is refused.
        """
        ...

    def to_hf(
        self, source: Path, target: Path, *, dtype: torch.dtype | None = None, overwrite: bool = False
    ) -> None:
        """Write the trained model of the checkpoint ``source`` as a Hugging Face directory.

        Raises ``ValueError`` where ``source`` is not complete or ``target`` cannot be written.
        """
        ...


def checkpoint_converter() -> CheckpointConverter:
    """The converter of the engine. Imported late: Megatron takes seconds to load."""
    from gapo_mega.engine.megatron.checkpoint import convert

    return convert
