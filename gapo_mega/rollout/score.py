"""Turns responses into rewards: objectives, log-probabilities, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

import torch
from torch import Tensor

from gapo_mega.advantages.rewards import kl_rewards
from gapo_mega.config import AlgorithmConfig
from gapo_mega.engine.base import Engine
from gapo_mega.objectives.base import Objective
from gapo_mega.types import Experience, Prompt, ResponseFacts, Rollout

# (scores_MB, logprobs_BT, ref_logprobs_BT, mask_BT, kl_beta) -> token_rewards_MBT
TokenRewards = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
Timer = Callable[[str], AbstractContextManager[None]]


def _checked(name: str, scores: Sequence[float], prompts: Sequence[Prompt]) -> list[float]:
    """The scores of one objective, one for each of ``prompts``, as numbers that are finite in float32."""
    if len(scores) != len(prompts):
        raise ValueError(
            f"objective {name!r}: found {len(scores)} scores, accepted: {len(prompts)}, one for each response"
        )
    limit = torch.finfo(torch.float32).max
    for i, score in enumerate(scores):
        number = isinstance(score, int | float)
        if not number or not abs(score) <= limit:  # a comparison, so that NaN is refused as well
            raise ValueError(
                f"objective {name!r}: found the score {score!r} for response {i}, an answer to prompt "
                f"{prompts[i].index}, accepted: a finite number within {limit:.3g}, the range of float32"
            )
    return [float(score) for score in scores]


class Scorer:
    """Turns a rollout into an experience without advantages."""

    def __init__(
        self,
        engine: Engine,
        objectives: Sequence[Objective],
        algorithm: AlgorithmConfig,
        token_rewards: TokenRewards,
        with_values: bool,
        timer: Timer,
        kl_beta: Callable[[], float] | None = None,
    ) -> None:
        """``kl_beta``: the coefficient of the KL reward, asked anew every time; none: the algorithm's."""
        self._engine = engine
        self._objectives = objectives
        self._algorithm = algorithm
        self._token_rewards = token_rewards
        self._with_values = with_values
        self._timer = timer
        self._kl_beta = kl_beta or (lambda: algorithm.kl_beta)

    def scores(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> Tensor:
        """``[M, B]`` float32. Each response is scored once per replica, not once per rank.

        ``facts``: without them, an objective that asks for token counts or ``finished`` refuses to score.
        Raises ``ValueError``, on every rank of the replica, unless every objective gives one number per
        response that is finite in float32.
        """
        local = [objective for objective in self._objectives if objective.wanted_model is None]
        by_name = self._on_first_rank(local, prompts, responses, facts)
        for objective in self._objectives:
            if objective.wanted_model is not None:  # a model over all ranks of the replica
                by_name[objective.name] = objective.score(prompts, responses, facts)
        rows = [_checked(objective.name, by_name[objective.name], prompts) for objective in self._objectives]
        return torch.tensor(rows, dtype=torch.float32).reshape(len(rows), len(responses))

    def _on_first_rank(
        self,
        objectives: Sequence[Objective],
        prompts: Sequence[Prompt],
        responses: Sequence[str],
        facts: ResponseFacts | None,
    ) -> dict[str, list[float]]:
        """Scores by objective on every rank; the replica's first rank computes them."""
        first = self._engine.layout.tensor_rank == 0 and self._engine.layout.pipeline_rank == 0
        outcome: dict[str, list[float]] | Exception = {}
        if first:
            try:
                outcome = {each.name: each.score(prompts, responses, facts) for each in objectives}
            except Exception as error:  # every rank must learn of it, or the others wait for ever
                outcome = error
        outcome = self._engine.broadcast_in_replica(outcome)
        if isinstance(outcome, Exception):
            raise outcome
        return outcome

    def score(self, rollout: Rollout) -> Experience:
        """Rewards per objective, old and reference log-probabilities, and values with a critic."""
        batch, mask_BT = rollout.batch, rollout.response_mask_BT
        with self._timer("score"):
            scores_MB = self.scores(rollout.prompts, rollout.responses, rollout.facts)
        old_BT = rollout.logprobs_BT
        if self._algorithm.old_logprobs == "recompute":
            with self._timer("old_logprobs"):
                old_BT = self._engine.logprobs(batch, "policy")
        with self._timer("reference"):
            ref_BT = self._engine.logprobs(batch, "reference")
        values_MBT = None
        kl_beta = self._kl_beta() if self._algorithm.kl == "reward" else 0.0
        if self._with_values:
            with self._timer("values"):
                values_MBT = self._engine.values(batch)
        return Experience(
            tokens_BT=rollout.tokens_BT,
            response_mask_BT=mask_BT,
            kept=rollout.kept,
            group_B=rollout.group_B,
            old_logprobs_BT=old_BT,
            ref_logprobs_BT=ref_BT,
            scores_MB=scores_MB,
            token_rewards_MBT=self._token_rewards(scores_MB, old_BT, ref_BT, mask_BT, kl_beta),
            values_MBT=values_MBT,
            kl_rewards_BT=kl_rewards(old_BT, ref_BT, mask_BT, kl_beta),
        )
