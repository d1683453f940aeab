"""Held-out prompts answered before, while and after training: same prompts, same sampling seeds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import chain

import torch

from gapo_mega.config import EvaluationConfig
from gapo_mega.engine.base import Engine
from gapo_mega.planning.shares import share
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.random_streams import undisturbed
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.response_scores import agreed
from gapo_mega.rollout.score import Scorer
from gapo_mega.types import Prompt, Rollout

_SEED_OFFSET = 77_003  # away from the seeds of training rollouts


@dataclass(frozen=True)
class Answers:
    """Responses to all held-out prompts, in the prompts' order, with their scores."""

    prompts: list[str]
    responses: list[str]
    scores: list[list[float]]  # [M][prompts x samples]


class HeldOut:
    """Answers the held-out prompts with the current policy, shared over data-parallel ranks."""

    def __init__(
        self,
        engine: Engine,
        collector: Collector,
        scorer: Scorer,
        prompts: list[Prompt],
        evaluation: EvaluationConfig,
        seed: int,
    ) -> None:
        self._engine = engine
        self._collector = collector
        self._scorer = scorer
        self._prompts = prompts
        self.samples = evaluation.samples_per_prompt
        self._seed = seed + _SEED_OFFSET

    def __len__(self) -> int:
        return len(self._prompts)

    def update_weights(self) -> None:
        """Have the next answers be those of the policy as it is. Collective."""
        self._collector.update_weights()

    def answer(self) -> Answers:
        """Answer and score the held-out prompts. Collective; the same on every rank, empty without any.

        Training draws the same random numbers with it as without.
        """
        with undisturbed():
            return self._answer()

    def _answer(self) -> Answers:
        self._engine.gather_parameters()  # this rank may have no prompt, and so no forward pass
        layout = self._engine.layout
        numbers, own = share(range(len(self._prompts)), layout.data_rank, layout.data, layout.in_step)
        rollout = recovered(self._engine, self._collector.update_weights, lambda: self._collected(numbers))
        self._collector.rest()
        # Apart from the collecting: no rank goes on to a score model while another has lost its server.
        part = agreed(self._engine, lambda: self._scored(numbers, own, rollout))
        # A stable sort: the samples of a prompt stay in order, whatever rank drew them.
        parts = self._engine.gather_over_data(part)
        everything = sorted(chain.from_iterable(parts), key=lambda answer: answer[0])
        if not everything:
            return Answers([], [], [])
        _, prompts, responses, scores = zip(*everything, strict=True)
        return Answers(list(prompts), list(responses), torch.tensor(scores, dtype=torch.float64).T.tolist())

    def _collected(self, numbers: Sequence[int]) -> Rollout | None:
        """Responses to the prompts ``numbers``; None where there are none of them."""
        if not numbers:
            return None
        layout, prompts = self._engine.layout, [self._prompts[i] for i in numbers]
        seed = self._seed * layout.data + layout.data_rank
        return self._collector.collect(prompts, self.samples, seed)

    def _scored(
        self, numbers: Sequence[int], own: int, rollout: Rollout | None
    ) -> list[tuple[int, str, str, list[float]]]:
        """Number and text of the prompt, response and scores of the first ``own`` prompts."""
        if rollout is None:
            return []
        scores_BM = self._scorer.scores(rollout.prompts, rollout.responses, rollout.facts).T.tolist()
        rows = [i for i in numbers for _ in range(self.samples)]
        texts = [prompt.text for prompt in rollout.prompts]
        part = list(zip(rows, texts, rollout.responses, scores_BM, strict=True))
        return part[: own * self.samples]
