"""What it takes to build an engine that does no training on rollouts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig, RolloutConfig
from gapo_mega.config.lora import LoraConfig
from gapo_mega.models.shape import ModelShape


@dataclass(frozen=True)
class LocalModel:
    """A model on this machine: a Hugging Face directory or a Megatron checkpoint."""

    source: Path
    shape: ModelShape


@dataclass(frozen=True)
class AnsweringSetup:
    """What it takes to build an engine that answers prompts and trains nothing.

    Attributes:
        policy: answers.
        reference: its divergence is measured from; None: it is not.
        model, parallel, rollout: sections of the configuration; the paths in them do not count.
        micro_batch: sequences of a forward pass.
        micro_batch_tokens: of a packed row, in place of ``micro_batch``; None: unpacked.
        chunk: response tokens whose logits are in memory at once; 0: all.
        seed: of the model-parallel random numbers.
        pad_id, eos_ids: of the policy's tokenizer.
    """

    policy: LocalModel
    reference: LocalModel | None
    model: ModelConfig
    parallel: ParallelConfig
    rollout: RolloutConfig
    micro_batch: int
    seed: int
    pad_id: int
    eos_ids: Sequence[int]
    micro_batch_tokens: int | None = None
    chunk: int = 0


@dataclass(frozen=True)
class SupervisedSetup:
    """What it takes to build a supervised engine.

    Attributes:
        shape: of the model; with fewer layers than the source has, the model takes the first ones.
        source: Hugging Face directory or Megatron checkpoint.
        model, parallel, optimizer: sections of the configuration.
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.
        micro_batch: rows of a microbatch.
        seed: of the model-parallel random numbers.
        config: entries of the trained model's ``config.json`` that differ from the source's.
        chat_template: Jinja text to store with the trained model; None: the source's own.
        lora: the adapters to train; None: all weights are trained.
        chunk: tokens to learn whose logits are in memory at once; 0: all.
    """

    shape: ModelShape
    source: Path
    model: ModelConfig
    parallel: ParallelConfig
    optimizer: OptimizerConfig
    total_steps: int
    micro_batch: int
    seed: int
    config: Mapping[str, object]
    chat_template: str | None = None
    lora: LoraConfig | None = None
    chunk: int = 0
