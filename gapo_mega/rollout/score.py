"""Turns responses into rewards: objectives, log-probabilities, values."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager

from torch import Tensor

from gapo_mega.advantages.rewards import kl_rewards
from gapo_mega.config import AlgorithmConfig
from gapo_mega.engine.base import Engine
from gapo_mega.objectives.base import Objective
from gapo_mega.rollout.response_scores import ResponseScorer, agreed
from gapo_mega.types import Experience, Rollout

# (scores_MB, logprobs_BT, ref_logprobs_BT, mask_BT, kl_beta) -> token_rewards_MBT
TokenRewards = Callable[[Tensor, Tensor, Tensor, Tensor, float], Tensor]
Timer = Callable[[str], AbstractContextManager[None]]


class Scorer(ResponseScorer):
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
        super().__init__(engine, objectives)
        self._engine = engine
        self._algorithm = algorithm
        self._token_rewards = token_rewards
        self._with_values = with_values
        self._timer = timer
        self._kl_beta = kl_beta or (lambda: algorithm.kl_beta)

    def agreed_scores(self, rollout: Rollout) -> Tensor:
        """``scores`` of a rollout that every data-parallel rank has one of; where one fails, all raise."""
        return agreed(self._engine, lambda: self.scores(rollout.prompts, rollout.responses, rollout.facts))

    def score(self, rollout: Rollout) -> Experience:
        """Rewards per objective, old and reference log-probabilities, and values with a critic."""
        batch, mask_BT = rollout.batch, rollout.response_mask_BT
        with self._timer("score"):
            scores_MB = self.agreed_scores(rollout)
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
