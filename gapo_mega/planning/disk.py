"""Predicts what a run writes that takes a model's size: checkpoints and the exported model.

What cannot be known in advance counts as nothing (running means of gradients, say), so that a run which is
refused would not have fitted.
"""

from __future__ import annotations

from dataclasses import dataclass

from gapo_mega.config import CheckpointConfig, OptimizerConfig
from gapo_mega.config.lora import LoraConfig
from gapo_mega.models.adapters import layer_parameters
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.activations import FP32
from gapo_mega.planning.memory import critic_parameters, stage_parameters
from gapo_mega.planning.resolved import ResolvedRun

GB = 1e9  # bytes


@dataclass(frozen=True)
class DiskPlan:
    """Bytes on the disk of ``output_dir``.

    Attributes:
        checkpoint: of one.
        at_once: checkpoints that are there at the same time; the oldest goes when the newest is complete.
        export: of the exported model; 0 where there is none.
        limit: the setting that says how many checkpoints are kept.
    """

    checkpoint: int
    at_once: int
    export: int
    limit: str = "checkpoint.keep"

    @property
    def needed(self) -> int:
        """All of it, at the end of the run."""
        return self.checkpoint * self.at_once + self.export


def predict_disk(
    parameters: int,
    dtype: str,
    optimizer: OptimizerConfig,
    settings: CheckpointConfig,
    steps: int,
    *,
    with_best: bool = False,
    critics: int = 0,
    adapters: int = 0,
) -> DiskPlan:
    """The disk that ``steps`` steps of training ``parameters`` take.

    ``critics``: bytes in a checkpoint of what is trained beside the model. ``adapters``: parameters that are
    trained in place of the model's, which are frozen; 0: there are none. A checkpoint that only a signal
    asks for is not counted.
    """
    every = settings.every_steps
    saves = -(-steps // every) if every else int(settings.save_final)
    exported = parameters * item_bytes(dtype) if settings.export_hf else 0
    checkpoint = state_bytes(parameters, dtype, optimizer)
    if adapters:
        checkpoint = parameters * item_bytes(dtype) + state_bytes(adapters, dtype, optimizer)
    checkpoint += critics
    keep, limit = settings.keep, "checkpoint.keep"
    if settings.keep_gb is not None:
        keep, limit = max(1, int(settings.keep_gb * GB // checkpoint)), "checkpoint.keep_gb"
    return DiskPlan(checkpoint, min(saves, keep + 1) + int(with_best), exported, limit)


def predict_training(resolved: ResolvedRun) -> DiskPlan:
    """``predict_disk`` of a training on objectives."""
    config = resolved.config
    critics = 0
    if resolved.critic is not None:
        count = critic_parameters(resolved.critic.shape, 1, 1, 0, resolved.value_heads)
        critics = resolved.value_models * state_bytes(count, config.model.dtype, config.critic.optimizer)
    return predict_disk(
        stage_parameters(resolved.shape, 1, 1, 0),
        config.model.dtype,
        config.optimizer,
        config.checkpoint,
        config.steps,
        with_best=config.checkpoint.best is not None,
        critics=critics,
        adapters=adapter_parameters(resolved.shape, config.model.lora),
    )


def adapter_parameters(shape: ModelShape, lora: LoraConfig | None) -> int:
    """Of all layers; 0 without adapters."""
    return 0 if lora is None else layer_parameters(shape, lora) * shape.num_layers


def state_bytes(parameters: int, dtype: str, optimizer: OptimizerConfig) -> int:
    """Of so many parameters and their optimizer state: moments, and the fp32 copy of bf16 ones."""
    moments = 2 if optimizer.name == "adam" else int(optimizer.momentum > 0)
    return parameters * (item_bytes(dtype) + FP32 * (moments + int(dtype == "bf16")))


def item_bytes(dtype: str) -> int:
    """Of one element of ``model.dtype``."""
    return 2 if dtype == "bf16" else FP32
