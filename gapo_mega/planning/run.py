"""What a run would be on a number of processes: layout, steps and memory, in words and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gapo_mega.config import Config
from gapo_mega.models.adapters import layer_parameters
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.memory import GIB, MemoryPlan
from gapo_mega.planning.resolved import ResolvedRun


@dataclass(frozen=True)
class RunPlan:
    """A run and its memory."""

    resolved: ResolvedRun
    memory: MemoryPlan

    def lines(self) -> list[str]:
        """Layout, sizes of a step, and memory per rank."""
        config, data = self.resolved.config, self.resolved.data
        parallel, rollout, algorithm = config.parallel, config.rollout, config.algorithm
        sequences = config.sequences()
        virtual = parallel.virtual_pipeline
        interleaved = f" ({virtual} chunks a stage)" if virtual > 1 else ""
        experts = f", experts over {parallel.sharing} ranks" if parallel.expert > 1 else ""
        context = f" x context {parallel.context}" if parallel.context > 1 else ""
        minibatch = sequences // data // algorithm.minibatches
        return [
            *(f"{parameter}: {card}" for parameter, card in self.resolved.cards.items()),
            f"layout: {self.resolved.world} processes = tensor {parallel.tensor} x pipeline "
            f"{parallel.pipeline}{interleaved}{context} x data {data}{experts}",
            f"step: {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {sequences} "
            f"sequences, {sequences // data} on a data-parallel rank",
            f"updates of a step: {algorithm.ppo_epochs} epochs x {algorithm.minibatches} minibatches of "
            f"{minibatch * data} sequences, in microbatches of {_microbatch(config)} on a data-parallel rank",
            *_adapters(config, self.resolved.shape),
            *_while_training(config),
            *self.memory.table().splitlines(),
        ]

    def fullest(self, device_gib: float | None) -> str:
        """The fullest rank's memory, and whether it fits into ``device_gib``, if that is given."""
        unit, size = self.memory.unit
        line = f"fullest rank: {self.memory.peak / size:.2f} {unit}"
        if device_gib is None:
            return line
        fits = self.memory.peak <= device_gib * GIB
        return f"{line}, {'fits' if fits else 'does not fit'} into {device_gib:g} GiB"

    def as_dict(self, device_gib: float | None) -> dict[str, Any]:
        """For JSON: layout, bytes by kind and stage, and whether they fit (null: not asked)."""
        parallel = self.resolved.config.parallel
        layout = {
            "tensor": parallel.tensor,
            "pipeline": parallel.pipeline,
            "virtual_pipeline": parallel.virtual_pipeline,
            "context": parallel.context,
            "data": self.resolved.data,
        }
        fits = None if device_gib is None else self.memory.peak <= device_gib * GIB
        cards = {parameter: card.name for parameter, card in self.resolved.cards.items()}
        run = {"world": self.resolved.world, "layout": layout, "cards": cards}
        return run | {**self.memory.as_dict(), "fits": fits}


def _microbatch(config: Config) -> str:
    tokens = config.micro_batch_tokens
    return str(config.micro_batch_size) if tokens is None else f"at most {tokens} packed tokens"


def _adapters(config: Config, shape: ModelShape) -> list[str]:
    """What is trained, where that is not the whole model."""
    lora = config.model.lora
    if lora is None:
        return []
    count = layer_parameters(shape, lora) * shape.num_layers
    return [
        f"adapters: rank {lora.rank} on {', '.join(lora.targets)}, {count} parameters; all others are "
        "frozen, and the reference is the policy without adapters (no second copy)"
    ]


def _while_training(config: Config) -> list[str]:
    """What a run does beside its steps: evaluations, the best checkpoint, kept responses."""
    steps, evaluation = config.steps, config.evaluation
    lines = []
    if evaluation.every_steps:
        each = config.data.heldout_prompts * evaluation.samples_per_prompt
        count = 1 + -(-steps // evaluation.every_steps)
        lines.append(
            f"evaluations: before training, every {evaluation.every_steps} steps and after the last, {count} "
            f"of at most {each} responses (the {steps} steps sample {steps * config.sequences()})"
        )
    if config.checkpoint.best is not None:
        patience = evaluation.early_stopping_patience
        early = "" if patience is None else f"; ends after {patience} evaluations without a better one"
        lines.append(
            f"checkpoints: the newest {config.checkpoint.keep} and that of the best evaluation by "
            f"{config.checkpoint.best}, which is the run's result{early}"
        )
    if config.logging.responses:
        kept = steps // config.logging.responses
        lines.append(f"responses: those of {kept} steps are kept, {config.sequences()} in a file")
    return lines
