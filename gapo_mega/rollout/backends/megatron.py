"""The engine's own generator: the trained weights, in the same processes and layout."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar

import torch

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.rollout.backends.base import RolloutBackend
from gapo_mega.types import Generation


class Megatron(RolloutBackend):
    """There is no second model: an update of the policy is one of the generator."""

    name: ClassVar[str] = "megatron"
    samples_policy: ClassVar[bool] = True

    def update_weights(self) -> None:
        self.policy.engine.generator.update_weights()

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        engine = self.policy.engine
        generation = engine.generator.generate(prompts, sampling, seed)
        return replace(generation, versions_B=torch.full((len(prompts),), engine.changes))
