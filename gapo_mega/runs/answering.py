"""Batches of prompts answered by a model, measured and scored. Every rank makes the same calls."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from itertools import chain
from typing import Literal

from gapo_mega.engine.base import Answering
from gapo_mega.evaluation.answers import Answer
from gapo_mega.planning.shares import share
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.response_scores import ResponseScorer
from gapo_mega.types import Prompt, ResponseFacts, Rollout

# same: the reference is the model itself, and nothing is to be computed.
Divergence = Literal["measured", "same", "none"]

_SEED_OFFSET = 177_013  # away from the seeds of training, and of its held-out answers


@dataclass(frozen=True)
class Manner:
    """How prompts are answered."""

    samples: int
    seed: int
    greedy: bool
    divergence: Divergence


class BatchAnswerer:
    """Answers batches of ``prompts``, shared over data-parallel ranks.

    Args:
        names: of the scorer's objectives, in order.
    """

    def __init__(
        self,
        engine: Answering,
        collector: Collector,
        scorer: ResponseScorer,
        names: Sequence[str],
        prompts: Sequence[Prompt],
        manner: Manner,
    ) -> None:
        self._engine = engine
        self._collector = collector
        self._scorer = scorer
        self._names = names
        self._prompts = prompts
        self._manner = manner

    def answer(self, numbers: Sequence[int]) -> list[Answer]:
        """Responses to the prompts ``numbers``, at least one, with all scores; the same on every rank."""
        mine, own = self._share(numbers)
        return self._gathered(self._answered(mine, numbers[0])[: own * self._manner.samples] if mine else [])

    def score(self, answers: Sequence[Answer]) -> list[Answer]:
        """``answers``, samples of a prompt side by side, with all scores; those that they have stay."""
        numbers, own = self._share(list(dict.fromkeys(answer.number for answer in answers)))
        mine = [answer for number in numbers for answer in answers if answer.number == number]
        prompts = [self._prompts[answer.number] for answer in mine]
        facts = ResponseFacts([a.tokens for a in mine], [a.finished for a in mine])
        scores = self._scores(prompts, [answer.response for answer in mine], facts) if mine else []
        scored = [
            replace(answer, scores=new | answer.scores) for answer, new in zip(mine, scores, strict=True)
        ]
        return self._gathered([answer for answer in scored if answer.number in numbers[:own]])

    def told(self, value: list[Answer] | None) -> list[Answer] | None:
        """The main rank's ``value``, on every rank."""
        first: list[Answer] | None = self._engine.gather_over_data(value)[0]
        found: list[Answer] | None = self._engine.broadcast_in_replica(first)
        return found

    def _share(self, numbers: Sequence[int]) -> tuple[list[int], int]:
        """What this data rank computes, and how many of the first are its own."""
        layout = self._engine.layout
        return share(numbers, layout.data_rank, layout.data, layout.in_step)

    def _answered(self, numbers: Sequence[int], first: int) -> list[Answer]:
        layout, samples = self._engine.layout, self._manner.samples
        seed = (self._manner.seed + _SEED_OFFSET) * 1_000_003 + first
        rollout = self._collector.collect(
            [self._prompts[i] for i in numbers],
            samples,
            seed * layout.data + layout.data_rank,
            greedy=self._manner.greedy,
        )
        facts = rollout.facts
        scores = self._scores(rollout.prompts, rollout.responses, facts)
        divergence = self._divergence(rollout)
        return [
            Answer(
                number=numbers[row // samples],
                sample=row % samples,
                prompt=rollout.prompts[row].text,
                response=response,
                tokens=facts.token_counts[row],
                finished=facts.finished[row],
                kl=divergence[row],
                scores=scores[row],
            )
            for row, response in enumerate(rollout.responses)
        ]

    def _scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts
    ) -> list[dict[str, float]]:
        scores_BM = self._scorer.scores(prompts, responses, facts).T.tolist()
        return [dict(zip(self._names, scores_M, strict=True)) for scores_M in scores_BM]

    def _divergence(self, rollout: Rollout) -> list[float] | list[None]:
        """Of each response: the mean over responses estimates KL(policy || reference) of whole responses."""
        if self._manner.divergence == "none":
            return [None] * rollout.batch_size
        if self._manner.divergence == "same":
            return [0.0] * rollout.batch_size
        # Both by the same forward pass, so that equal models differ by nothing.
        policy_BT, reference_BT = (
            self._engine.logprobs(rollout.batch, "policy"),
            self._engine.logprobs(rollout.batch, "reference"),
        )
        found: list[float] = (policy_BT.double() - reference_BT.double()).sum(dim=1).tolist()
        return found

    def _gathered(self, part: list[Answer]) -> list[Answer]:
        everything = chain.from_iterable(self._engine.gather_over_data(part))
        return sorted(everything, key=lambda answer: (answer.number, answer.sample))


def batches(start: int, prompts: int, samples: int, sequences: int, data_ranks: int) -> list[range]:
    """The prompts from ``start`` on, in pieces of at most ``sequences`` responses on each data rank."""
    size = max(1, sequences // samples) * data_ranks
    return [range(first, min(first + size, prompts)) for first in range(start, prompts, size)]
