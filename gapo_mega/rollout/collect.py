"""Turns prompts into decoded responses."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Protocol

import torch
from transformers import PreTrainedTokenizerBase

from gapo_mega.engine.base import Layout, SamplingParameters
from gapo_mega.types import Generation, Prompt, Rollout, well_formed


def own_seed(seed: int, layout: Layout) -> int:
    """A data-parallel rank's seed, of a step's."""
    return seed * layout.data + layout.data_rank


class Source(Protocol):
    """What answers: an engine's generator, or a rollout back end."""

    def generate(
        self, prompts: Sequence[Sequence[int]], sampling: SamplingParameters, seed: int
    ) -> Generation:
        """Responses to this data-parallel rank's prompts."""
        ...

    def update_weights(self) -> None:
        """Take over the policy's parameters."""
        ...

    def rest(self) -> None:
        """Nothing is asked before the next ``update_weights``."""
        ...


class Collector:
    """Samples responses of the current policy for this data-parallel rank's prompts."""

    def __init__(
        self, generator: Source, tokenizer: PreTrainedTokenizerBase, sampling: SamplingParameters
    ) -> None:
        self._generator = generator
        self._tokenizer = tokenizer
        self._sampling = sampling

    def update_weights(self) -> None:
        """Have the generator take over the policy's parameters. Collective over all ranks."""
        self._generator.update_weights()

    def rest(self) -> None:
        """Nothing is collected before the next ``update_weights``. Collective over all ranks."""
        self._generator.rest()

    def collect(self, prompts: list[Prompt], samples: int, seed: int, greedy: bool = False) -> Rollout:
        """``samples`` responses per prompt; the samples of a prompt are adjacent rows.

        ``greedy``: always the most likely token, after the repetition penalty.
        """
        tokens, sampling = self.question(prompts, samples, greedy)
        return self.rollout(prompts, samples, self._generator.generate(tokens, sampling, seed))

    def question(
        self, prompts: Sequence[Prompt], samples: int, greedy: bool = False
    ) -> tuple[list[Sequence[int]], SamplingParameters]:
        """What ``collect`` asks for: token ids of every response's prompt, and how to sample."""
        sampling = self._sampling
        if greedy:
            sampling = replace(sampling, temperature=0.0, top_k=0, top_p=1.0)
        return [prompt.token_ids for prompt in prompts for _ in range(samples)], sampling

    def rollout(self, prompts: Sequence[Prompt], samples: int, generation: Generation) -> Rollout:
        """The generator's answer to ``question``, with the text of the responses."""
        repeated = [prompt for prompt in prompts for _ in range(samples)]
        responses = [
            well_formed(str(self._tokenizer.decode(tokens_T[mask_T], skip_special_tokens=True)))
            for tokens_T, mask_T in zip(generation.tokens_BT, generation.response_mask_BT, strict=True)
        ]
        return Rollout(
            prompts=repeated,
            responses=responses,
            group_B=torch.arange(len(prompts)).repeat_interleave(samples),
            tokens_BT=generation.tokens_BT,
            prompt_lengths_B=generation.prompt_lengths_B,
            response_mask_BT=generation.response_mask_BT,
            logprobs_BT=generation.logprobs_BT,
            finished_B=generation.finished_B,
            kept=generation.kept,
            versions_B=generation.versions_B,
        )
