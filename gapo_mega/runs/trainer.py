"""Training, readable top to bottom: prompts, rollout, rewards, advantages, one aggregated update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gapo_mega.advantages.rewards import token_rewards
from gapo_mega.aggregation.base import ZeroGradientError
from gapo_mega.data.order import PROMPTS, Order
from gapo_mega.data.prompts import PromptPosition
from gapo_mega.engine.base import Engine, GradientReport, SamplingParameters, generator_seed
from gapo_mega.losses import value_loss_sum
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.experience import ExperienceMaker
from gapo_mega.rollout.facts import BatchFacts
from gapo_mega.rollout.heldout import Answers, HeldOut
from gapo_mega.rollout.score import Scorer
from gapo_mega.runs.finish import finish
from gapo_mega.runs.log import RunLog
from gapo_mega.runs.loop import RunLoop
from gapo_mega.runs.metrics import step_metrics
from gapo_mega.runs.phases import Phases
from gapo_mega.runs.session import Session
from gapo_mega.runs.skips import Skips
from gapo_mega.types import Experience, Prompt


class Trainer:
    """The work of one training run, for ``RunLoop``. Every rank builds one; only rank 0 writes files."""

    def __init__(
        self,
        resolved: ResolvedRun,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        train_prompts: Sequence[Prompt],
        heldout_prompts: Sequence[Prompt],
        *,
        with_report: bool = True,
        session: Session | None = None,
    ) -> None:
        """``with_report`` false leaves out what follows the last step: export, held-out answers, report.

        ``session``: the run's hold on its directory; checkpoints say what it tells them that they belong to.
        """
        self.resolved = resolved
        self.config = config = resolved.config
        self.engine = engine
        self.names = [objective.name for objective in resolved.objectives]
        self.aggregator = resolved.aggregator
        self.phases = Phases()
        self.skips = Skips(self.names, config.gradients.max_nonfinite_steps)
        self.prompts = train_prompts
        self.order = Order(
            len(train_prompts),
            config.rollout.prompts_per_step,
            engine.layout.data_rank,
            engine.layout.data,
            config.seed,
            shuffle=config.data.shuffle,
            wording=PROMPTS,
        )
        self._build_rollout(tokenizer, heldout_prompts)
        total = resolved.total_updates
        directory = Path(config.output_dir)
        self.log = RunLog(directory, self.names, config.logging, total, engine.layout.is_main)
        record = None if session is None else session.record()
        self.loop = RunLoop(self, engine, directory, config.checkpoint, self.log, record)
        self._resumed = [] if session is None else session.history
        self.before: Answers | None = None
        self._with_report = with_report
        self._seconds_before_resume = 0.0
        self._started = time.perf_counter()

    def _build_rollout(self, tokenizer: PreTrainedTokenizerBase, heldout_prompts: Sequence[Prompt]) -> None:
        config, rollout, engine = self.config, self.config.rollout, self.engine
        for objective in self.resolved.objectives:
            if objective.wanted_model is not None:
                objective.attach(engine.score_model(objective.wanted_model))
        collector = Collector(engine.generator, tokenizer, SamplingParameters.of(rollout))
        scorer = Scorer(
            engine,
            self.resolved.objectives,
            config.algorithm,
            token_rewards,
            self.resolved.estimator.needs_values,
            self.phases,
        )
        self.maker = ExperienceMaker(
            engine,
            collector,
            scorer,
            self.resolved.estimator,
            self.names,
            samples=rollout.samples_per_prompt,
            whitened=config.advantages.whiten,
            timer=self.phases,
        )
        self.heldout = HeldOut(
            engine, collector, scorer, list(heldout_prompts), config.evaluation, config.seed
        )

    def run(self) -> bool:
        """Train to the end or to a signal; see ``RunLoop.run``."""
        return self.loop.run()

    # -- the work ------------------------------------------------------------------------------------
    @property
    def total_steps(self) -> int:
        """Rollouts of the whole run."""
        return self.config.steps

    @property
    def updates_per_step(self) -> int:
        """Optimizer steps of one rollout."""
        return self.resolved.updates_per_step

    def begin(self) -> None:
        """Answer the held-out prompts with the policy as it was given, if no checkpoint has the answers."""
        if self.before is None:
            self.before = self.heldout.answer()

    def train_step(self, step: int) -> None:
        """Roll out, score, estimate advantages, and update once per minibatch."""
        self.phases.restart()
        algorithm = self.config.algorithm
        seed = self.config.seed * 1_000_003 + step
        prompts = [self.prompts[i] for i in self.order.items(step)]
        experience, facts = self.maker.make(prompts, seed)
        self.aggregator.observe(*torch.tensor([facts.rewards, facts.spreads], dtype=torch.float64))
        order = torch.Generator().manual_seed(generator_seed(seed))
        update = step * self.updates_per_step
        for _ in range(algorithm.ppo_epochs):
            for minibatch in experience.minibatches(algorithm.minibatches, order):
                critic_losses = self._update_critic(minibatch)
                report = self._update_policy(minibatch)
                update += 1
                self._record(update, report, facts, critic_losses)
                self.skips.take(report, update)
                self.phases.restart()

    def finish(self) -> None:
        """Export the policy, answer the held-out prompts again, and write summary and report."""
        if self._with_report:
            assert self.before is not None
            finish(
                self.config, self.engine, self.names, self.before, self.heldout, self._elapsed, self._resumed
            )

    def state_dict(self) -> dict[str, Any]:
        """Positions, memory of the aggregator, and the answers before training."""
        return {
            "schedule": dataclasses.asdict(self._position()),
            "aggregator": self.aggregator.state_dict(),
            "skipped_in_a_row": self.skips.in_a_row,
            "before": dataclasses.asdict(self.before) if self.before else None,
            "seconds": self._elapsed(),
        }

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for other prompts or another aggregator."""
        self._position().check_same_prompts(PromptPosition(**state["schedule"]))
        self.aggregator.load_state_dict(state["aggregator"])
        self.skips.in_a_row = int(state["skipped_in_a_row"])
        self.before = Answers(**state["before"]) if state["before"] else None
        self._seconds_before_resume = float(state["seconds"])

    def _position(self) -> PromptPosition:
        return PromptPosition.of(self.prompts, self.order, self.loop.step)

    # -- one update ----------------------------------------------------------------------------------
    def _update_policy(self, minibatch: Experience) -> GradientReport:
        try:
            return self.engine.update_policy(minibatch, self.resolved.loss, self.aggregator)
        except ZeroGradientError as error:
            at_fault = ", ".join(self.names[i] for i in error.objectives)
            raise RuntimeError(
                f"stopped: the gradient of {at_fault} is zero (all its rewards are alike) and "
                "aggregation.options.zero_gradient is 'stop'"
            ) from error

    def _value_loss(self, values_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        assert batch.values_MBT is not None and batch.returns_MBT is not None
        return value_loss_sum(
            values_BT,
            batch.values_MBT[objective],
            batch.returns_MBT[objective],
            batch.response_mask_BT,
            self.config.algorithm.value_clip,
        )

    def _update_critic(self, minibatch: Experience) -> list[float]:
        """Update the critic; the loss of every value model, none where the estimator needs no values."""
        if not self.resolved.estimator.needs_values:
            return []
        with self.phases("critic"):
            return self.engine.update_critic(minibatch, self._value_loss)

    def _record(
        self, update: int, report: GradientReport, facts: BatchFacts, critic_losses: Sequence[float]
    ) -> None:
        seconds = self.phases.total()
        metrics = step_metrics(
            report,
            self.names,
            rewards=facts.rewards,
            kl=facts.kl,
            # Every update gets an equal share of the rollout's tokens; the first one holds its time.
            tokens_per_second=facts.tokens / self.updates_per_step / seconds,
            peak_memory_bytes=self.engine.peak_memory(),
            seconds={**self.phases.seconds, "step": seconds},
            extra=facts.extra | {f"critic_loss/{i}": loss for i, loss in enumerate(critic_losses)},
        )
        self.log.write(update, metrics)

    def _elapsed(self) -> float:
        """Seconds of the whole run, those before it was resumed included."""
        return self._seconds_before_resume + time.perf_counter() - self._started
