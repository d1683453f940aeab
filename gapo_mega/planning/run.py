"""What a run would be on a number of processes: layout, steps and memory, in words and for programs."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from gapo_mega.config import Config
from gapo_mega.planning.layout import data_parallel_size
from gapo_mega.planning.memory import GIB, MemoryPlan


@dataclass(frozen=True)
class RunPlan:
    """A configuration on ``world_size`` processes."""

    config: Config
    world_size: int
    memory: MemoryPlan

    @property
    def data(self) -> int:
        """Data-parallel size."""
        return data_parallel_size(self.config, self.world_size)

    def lines(self) -> list[str]:
        """Layout, sizes of a step, and memory per rank."""
        parallel, rollout, algorithm = self.config.parallel, self.config.rollout, self.config.algorithm
        sequences = rollout.prompts_per_step * rollout.samples_per_prompt
        minibatch = sequences // self.data // algorithm.minibatches
        return [
            f"layout: {self.world_size} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline} "
            f"x data {self.data}",
            f"step: {rollout.prompts_per_step} prompts x {rollout.samples_per_prompt} samples = {sequences} "
            f"sequences, {sequences // self.data} on a data-parallel rank",
            f"updates of a step: {algorithm.ppo_epochs} epochs x {algorithm.minibatches} minibatches of "
            f"{minibatch * self.data} sequences, in microbatches of {self.config.micro_batch_size} on a "
            "data-parallel rank",
            *self.memory.table().splitlines(),
        ]

    def fullest(self, device_gib: float | None) -> str:
        """The fullest rank's memory, and whether it fits into ``device_gib``, if that is given."""
        peak = self.memory.peak / GIB
        line = f"fullest rank: {peak:.2f} GiB"
        if device_gib is None:
            return line
        return f"{line}, {'fits' if peak <= device_gib else 'does not fit'} into {device_gib:g} GiB"

    def as_dict(self, device_gib: float | None) -> dict[str, Any]:
        """For JSON: layout, bytes by kind and stage, and whether they fit (null: not asked)."""
        parallel = self.config.parallel
        layout = {"tensor": parallel.tensor, "pipeline": parallel.pipeline, "data": self.data}
        fits = None if device_gib is None else self.memory.peak <= device_gib * GIB
        return {"world": self.world_size, "layout": layout, **self.memory.as_dict(), "fits": fits}
