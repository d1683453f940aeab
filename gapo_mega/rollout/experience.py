"""One step's batch: prompts answered, scored, and turned into advantages."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable, Sequence

import torch

from gapo_mega.advantages.base import AdvantageEstimator
from gapo_mega.advantages.rewards import whiten
from gapo_mega.engine.base import Engine
from gapo_mega.rollout.ahead import Sampled
from gapo_mega.rollout.collect import Collector, own_seed
from gapo_mega.rollout.correction import Correction
from gapo_mega.rollout.facts import BatchFacts, batch_facts
from gapo_mega.rollout.flat import without_flat
from gapo_mega.rollout.recovery import recovered
from gapo_mega.rollout.scalarized import Scalarized, Weighing
from gapo_mega.rollout.score import Scorer, Timer
from gapo_mega.types import Experience, Prompt, Rollout

logger = logging.getLogger(__name__)


class ExperienceMaker:
    """Everything between the prompts of a step and its updates, on this data-parallel rank.

    Args:
        names: of the objectives.
        scalarized: makes one set of advantages, if the run has a scalarizer; None: one an objective.
        weighing: asks a scalarizer for the weights of the objectives' gradients, if that is what it gives.
        correction: for rollouts that were drawn from another distribution; None: every weight is 1.
        samples: responses per prompt.
        filtered: prompts whose scores are flat in every objective are left out.
        whitened: advantages get mean 0 and variance 1 per objective, over the whole batch.
        timer: measures the phase ``rollout``; the scorer measures its own.
    """

    def __init__(
        self,
        engine: Engine,
        collector: Collector,
        scorer: Scorer,
        estimator: AdvantageEstimator,
        names: Sequence[str],
        *,
        samples: int,
        whitened: bool,
        filtered: bool = False,
        timer: Timer,
        scalarized: Scalarized | None = None,
        weighing: Weighing | None = None,
        correction: Correction | None = None,
    ) -> None:
        self._engine = engine
        self._collector = collector
        self._scorer = scorer
        self._estimator = estimator
        self._names = list(names)
        self._samples = samples
        self._whitened = whitened
        self._filtered = filtered
        self._timer = timer
        self._scalarized = scalarized
        self._weighing = weighing
        self._correction = correction

    def make(
        self,
        prompts: list[Prompt],
        seed: int,
        watch: Callable[[Rollout, Experience], None] | None = None,
        sampled: Sampled | None = None,
    ) -> tuple[Experience, BatchFacts]:
        """The experience with advantages, and the facts that the log takes. Collective.

        ``prompts`` are this rank's; ``seed`` is the step's, from which every data rank derives its own.
        ``watch`` is shown the scored rollout with all its prompts. ``sampled``: the rollout, where it was
        drawn ahead; None: it is drawn now.
        """
        rollout = self._rollout(prompts, seed) if sampled is None else sampled.rollout
        if not self._estimator.needs_greedy:
            self._collector.rest()
        experience = self._scorer.score(rollout)
        if watch is not None:
            watch(rollout, experience)
        if self._estimator.needs_greedy:
            greedy = self._greedy(prompts, seed) if sampled is None else sampled.greedy
            assert greedy is not None
            self._collector.rest()
            experience = self._with_greedy_scores(experience, greedy)
        experience, told = self._estimate(without_flat(experience) if self._filtered else experience)
        self._tell_infinite(experience)
        experience, corrected = self._correct(rollout, self._whiten(experience))
        facts = batch_facts(self._engine, self._names, rollout, experience, self._samples)
        drawn = {} if sampled is None else sampled.facts
        return experience, dataclasses.replace(facts, extra=facts.extra | told | corrected | drawn)

    def _rollout(self, prompts: list[Prompt], seed: int) -> Rollout:
        with self._timer("rollout"):
            self._collector.update_weights()
            return self._collected(prompts, self._samples, seed)

    def _greedy(self, prompts: list[Prompt], seed: int) -> Rollout:
        with self._timer("greedy"):
            return self._collected(prompts, 1, seed, greedy=True)

    def _collected(self, prompts: list[Prompt], samples: int, seed: int, *, greedy: bool = False) -> Rollout:
        own = own_seed(seed, self._engine.layout)
        return recovered(
            self._engine,
            self._collector.update_weights,
            lambda: self._collector.collect(prompts, samples, own, greedy),
        )

    def _estimate(self, experience: Experience) -> tuple[Experience, dict[str, float]]:
        """The experience with advantages, and what a scalarizer says of it."""
        if self._scalarized is not None:
            return self._scalarized(experience)
        told = {} if self._weighing is None else self._weighing(experience)
        return self._estimator(experience), told

    def _correct(self, rollout: Rollout, experience: Experience) -> tuple[Experience, dict[str, float]]:
        """Weigh the tokens of all advantages alike, after they have their mean and variance."""
        if self._correction is None:
            return experience, {}
        mask_BT, made_MBT = experience.response_mask_BT, experience.advantages_MBT
        assert made_MBT is not None
        weights_BT = self._correction.weights(experience.old_logprobs_BT, rollout.logprobs_BT, mask_BT)
        facts = self._correction.facts(self._engine, weights_BT, mask_BT)
        corrected_MBT = made_MBT * weights_BT
        return dataclasses.replace(experience, advantages_MBT=corrected_MBT, correction_BT=weights_BT), facts

    def _with_greedy_scores(self, experience: Experience, greedy: Rollout) -> Experience:
        with self._timer("greedy"):
            scores_MG = self._scorer.agreed_scores(greedy)
        # The collector numbers prompts from 0, in their order.
        return dataclasses.replace(experience, greedy_scores_MB=scores_MG[:, experience.group_B])

    def _tell_infinite(self, experience: Experience) -> None:
        """Name finite scores whose advantages are not: else the log would blame the gradient alone."""
        assert experience.advantages_MBT is not None
        wrong_MB = ~experience.advantages_MBT.isfinite().all(dim=2)
        if self._scalarized is not None and bool(wrong_MB[-1].any()):
            row = int(wrong_MB[-1].nonzero()[0])
            logger.warning(
                "scalarization: found the scores %s in row %d, whose advantage is not finite (%d rows in "
                "all); accepted: scores whose differences float32 holds",
                experience.scores_MB[:, row].tolist(),
                row,
                int(wrong_MB[-1].sum()),
            )
            return
        for index, row in wrong_MB.nonzero()[:1].tolist():
            logger.warning(
                "objective %s: found the score %s in row %d, whose advantage is not finite (%d rows in all); "
                "accepted: scores whose differences float32 holds",
                self._names[index],
                float(experience.scores_MB[index, row]),
                row,
                int(wrong_MB[index].sum()),
            )

    def _whiten(self, experience: Experience) -> Experience:
        """Every set of advantages that the run or the estimator that made it wants whitened."""
        made_MBT = experience.advantages_MBT
        assert made_MBT is not None
        by_estimator = [True] * len(made_MBT)
        if self._scalarized is not None:
            by_estimator[-1] = self._scalarized.estimates
        wanted = [self._whitened or (own and self._estimator.whitens) for own in by_estimator]
        if not any(wanted):
            return experience
        whitened_MBT = whiten(made_MBT, experience.response_mask_BT, self._engine.sum_over_data)
        advantages_MBT = torch.where(torch.tensor(wanted)[:, None, None], whitened_MBT, made_MBT)
        return dataclasses.replace(experience, advantages_MBT=advantages_MBT)
