"""Training, readable top to bottom: prompts, rollout, rewards, advantages, one aggregated update."""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from gapo_mega import aggregation
from gapo_mega.advantages.rewards import token_rewards
from gapo_mega.aggregation.base import ZeroGradientError
from gapo_mega.config.checks import KL_ROW
from gapo_mega.data.order import PROMPTS, Order
from gapo_mega.data.prompts import PromptPosition
from gapo_mega.engine.base import Engine, GradientReport, SamplingParameters, generator_seed
from gapo_mega.losses import value_loss_sum
from gapo_mega.planning.disk import predict_training
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.rollout.ahead import Ahead, Steps
from gapo_mega.rollout.backends import RolloutBackend
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.correction import correction_of
from gapo_mega.rollout.experience import ExperienceMaker
from gapo_mega.rollout.facts import BatchFacts
from gapo_mega.rollout.heldout import Answers, HeldOut
from gapo_mega.rollout.kl import KlCoefficient
from gapo_mega.rollout.response_scores import attach_score_models
from gapo_mega.rollout.scalarized import Scalarized, Weighing
from gapo_mega.rollout.score import Scorer
from gapo_mega.runs.evaluations import Evaluations
from gapo_mega.runs.finish import finish
from gapo_mega.runs.kl import loss_with_kl, method_with_kl
from gapo_mega.runs.log import RunLog
from gapo_mega.runs.loop import RunLoop
from gapo_mega.runs.metrics import step_metrics
from gapo_mega.runs.phases import Phases
from gapo_mega.runs.responses import ResponseFiles
from gapo_mega.runs.session import Session
from gapo_mega.runs.shared_answers import SharedAnswers
from gapo_mega.runs.skips import Skips
from gapo_mega.scalarization import Weighted
from gapo_mega.scalarization.safe import SafeWeights
from gapo_mega.types import Experience, Prompt
from gapo_mega.whereabouts import within


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
        shared: SharedAnswers | None = None,
        backend: RolloutBackend | None = None,
    ) -> None:
        """``with_report`` false leaves out what follows the last step: export, held-out answers, report.

        ``session``: the run's hold on its directory; checkpoints say what it tells them that they belong to.
        ``shared``: where answers before training may be had without asking the policy.
        ``backend``: where responses come from; none: the engine's generator.
        """
        self.resolved = resolved
        self.config = config = resolved.config
        self.engine = engine
        self.names = [objective.name for objective in resolved.objectives]
        self.rows = list(config.rows)
        self.aggregator = resolved.aggregator
        algorithm = config.algorithm
        self.kl = KlCoefficient(algorithm.kl_beta, algorithm.kl_target, algorithm.kl_horizon)
        self._loss = loss_with_kl(resolved.loss, config, self.kl)
        self._method = method_with_kl(resolved.aggregator, config, self.kl)
        self.scalarizer = resolved.scalarizer
        # Of audited updates: the scalarizer's row, the last, and nothing of the objectives'.
        one_hot = [float(row == config.rows[-1]) for row in config.audited_rows]
        self._observing = aggregation.build("weighted_sum", weights=one_hot or None)
        self.phases = Phases()
        self.skips = Skips(self.rows, config.gradients.max_nonfinite_steps)
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
        self._backend = backend
        self._build_rollout(tokenizer, heldout_prompts)
        total = resolved.total_updates
        directory = Path(config.output_dir)
        self.log = RunLog(directory, self.names, config.logging, total, engine.layout.is_main)
        record = None if session is None else session.record()
        self.evaluations = Evaluations(config, engine, self.names, self.heldout, shared)
        self.responses = ResponseFiles(directory, self.names, config.logging.responses, engine)
        selection = self.evaluations.selection
        everyone = None if session is None else session.everyone
        checkpoint = predict_training(resolved).checkpoint
        self.loop = RunLoop(
            self, engine, directory, config.checkpoint, self.log, record, selection, everyone, checkpoint
        )
        self._resumed = [] if session is None else session.history
        self._export = None if session is None else session.export
        self._with_report = with_report
        self._seconds_before_resume = 0.0
        self._started = time.perf_counter()

    def _build_rollout(self, tokenizer: PreTrainedTokenizerBase, heldout_prompts: Sequence[Prompt]) -> None:
        config, rollout, engine = self.config, self.config.rollout, self.engine
        attach_score_models(engine, self.resolved.objectives)
        collector = Collector(self._backend or engine.generator, tokenizer, SamplingParameters.of(rollout))
        samples_policy = self._backend is None or (self._backend.samples_policy and not rollout.ahead)
        self._ahead = self._drawn_ahead(collector)
        scorer = Scorer(
            engine,
            self.resolved.objectives,
            config.algorithm,
            token_rewards,
            self.resolved.estimator.needs_values,
            self.phases,
            lambda: self.kl.value,
        )
        self.maker = ExperienceMaker(
            engine,
            collector,
            scorer,
            self.resolved.estimator,
            self.names,
            samples=rollout.samples_per_prompt,
            whitened=config.advantages.whiten,
            filtered=config.advantages.filter_flat,
            timer=self.phases,
            scalarized=self._scalarized(),
            weighing=self._weighing(),
            correction=correction_of(
                config.algorithm,
                samples_policy=samples_policy,
                exact=samples_policy and config.model.dtype == "fp32",
            ),
        )
        self.heldout = HeldOut(
            engine, collector, scorer, list(heldout_prompts), config.evaluation, config.seed
        )

    def _drawn_ahead(self, collector: Collector) -> Ahead | None:
        rollout = self.config.rollout
        if rollout.ahead == 0:
            return None
        assert self._backend is not None
        greedy = self.resolved.estimator.needs_greedy
        steps = Steps(self.config.steps, self._prompts, self._seed, rollout.samples_per_prompt, greedy)
        return Ahead(self.engine, self._backend, collector, steps, rollout.ahead, self.phases)

    def _prompts(self, step: int) -> list[Prompt]:
        return [self.prompts[i] for i in self.order.items(step)]

    def _seed(self, step: int) -> int:
        return self.config.seed * 1_000_003 + step

    def _scalarized(self) -> Scalarized | None:
        if self.scalarizer is None or self.config.one_signal is None:
            return None
        audited = bool(self.config.audited_rows)
        return Scalarized(self.engine, self.scalarizer, self.resolved.estimator, audited)

    def _weighing(self) -> Weighing | None:
        if self.scalarizer is None or self.config.one_signal is not None:
            return None
        assert isinstance(self.scalarizer, Weighted) and isinstance(self.aggregator, SafeWeights)
        return Weighing(self.engine, self.scalarizer, self.aggregator.take)

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

    @property
    def before(self) -> Answers | None:
        """The held-out answers before training; None until they are there."""
        return self.evaluations.before

    def begin(self) -> None:
        """Answer the held-out prompts with the policy as it was given, if no checkpoint has the answers.

        They are also the start that methods measure progress from.
        """
        self.responses.drop_after(self.loop.step)
        if self._backend is not None:
            self._backend.update_weights()
        self.evaluations.begin()
        start = self.evaluations.start()
        if start is not None and self.loop.step == 0:
            self.aggregator.begin(*start)
            if self.scalarizer is not None:
                self.scalarizer.begin(*start)

    def train_step(self, step: int) -> dict[str, float]:
        """Roll out, score, estimate advantages, and update once per minibatch."""
        self.phases.restart()
        algorithm = self.config.algorithm
        seed = self._seed(step)
        done = step + 1
        watch = partial(self.responses.write, done) if self.responses.is_due(done) else None
        sampled = None if self._ahead is None else self._ahead.take(step)
        experience, facts = self.maker.make(self._prompts(step), seed, watch, sampled)
        self.aggregator.observe(*torch.tensor([facts.rewards, facts.spreads], dtype=torch.float64))
        order = torch.Generator().manual_seed(generator_seed(seed))
        update, last = step * self.updates_per_step, done * self.updates_per_step
        metrics: dict[str, float] = {}
        for _ in range(algorithm.ppo_epochs):
            for minibatch in experience.minibatches(algorithm.minibatches, order):
                update += 1
                critic_losses = self._update_critic(minibatch)
                audit = self._is_audited(update)
                with within("update"):
                    report = self._update_policy(minibatch, audit)
                rows = None if self.config.one_signal is None else self._rows(audit)
                metrics = self._metrics(report, facts, critic_losses, rows)
                self.skips.take(report, update, rows)
                if update < last or self.skips.too_many:
                    self.log.write(update, metrics)
                self.skips.check()
                self.phases.restart()
        self.kl.observe(facts.kl * facts.extra["response_length"], self.config.sequences())
        return metrics

    def end_step(self, done: int, metrics: Mapping[str, float]) -> None:
        """Answer the held-out prompts if it is time to, log the last update, and write the report."""
        evaluates = self.evaluations.is_due(done)
        found = dict(metrics)
        if evaluates:
            self.phases.restart()
            with self.phases("evaluation"):
                if self._ahead is not None:
                    self._ahead.settle()
                found |= self.evaluations.measure(done)
            found["time/evaluation"] = self.phases.seconds["evaluation"]
        self.log.write(done * self.updates_per_step, found)
        if evaluates and self._with_report:
            self.evaluations.report(done)

    def finish(self) -> None:
        """Export the policy, answer the held-out prompts again, and write summary and report."""
        if self._ahead is not None:
            self._ahead.drop()
        if self._with_report:
            best = self.loop.best_checkpoint()
            finish(
                self.config,
                self.engine,
                self.names,
                self.evaluations,
                self.loop.step,
                best,
                self._elapsed,
                self._resumed,
                self._export,
            )

    def state_dict(self) -> dict[str, Any]:
        """Positions, memory of aggregator and scalarizer, and the answers before training."""
        return {
            "schedule": dataclasses.asdict(self._position()),
            "aggregator": self.aggregator.state_dict(),
            "kl": self.kl.state_dict(),
            "scalarizer": {} if self.scalarizer is None else self.scalarizer.state_dict(),
            "skipped_in_a_row": self.skips.in_a_row,
            **self.evaluations.state_dict(),
            "seconds": self._elapsed(),
        }

    def in_flight(self, step: int) -> dict[str, Any]:
        """Responses that were drawn ahead by policies that are gone."""
        return {} if self._ahead is None else {"ahead": self._ahead.state_dict(step)}

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Inverse of both. Raises ``ValueError`` for other prompts or another aggregator."""
        self._position().check_same_prompts(PromptPosition(**state["schedule"]))
        self.aggregator.load_state_dict(state["aggregator"])
        self.kl.load_state_dict(state.get("kl", {}))
        if self.scalarizer is not None:
            self.scalarizer.load_state_dict(state["scalarizer"])
        self.skips.in_a_row = int(state["skipped_in_a_row"])
        self.evaluations.load_state_dict(state)
        if self._ahead is not None:
            self._ahead.load_state_dict(state.get("ahead", {}))
        self._seconds_before_resume = float(state["seconds"])

    def _position(self) -> PromptPosition:
        return PromptPosition.of(self.prompts, self.order, self.loop.step)

    # -- one update ----------------------------------------------------------------------------------
    def _is_audited(self, update: int) -> bool:
        every = self.config.gradients.audit_every
        return every > 0 and update % every == 0

    def _rows(self, audit: bool) -> Sequence[str]:
        """Names of the gradients that an update measures."""
        return self.config.audited_rows if audit else self.config.rows

    def _update_policy(self, minibatch: Experience, audit: bool) -> GradientReport:
        assert minibatch.advantages_MBT is not None
        if audit:
            return self.engine.update_policy(minibatch, self._loss, self._observing, audit=True)
        if self.config.audited_rows:
            own_MBT = minibatch.advantages_MBT[-len(self.config.rows) :]
            minibatch = dataclasses.replace(minibatch, advantages_MBT=own_MBT)
        try:
            return self.engine.update_policy(minibatch, self._loss, self._method)
        except ZeroGradientError as error:
            at_fault = [self.rows[i] for i in error.objectives]
            why = "the policy is the reference" if at_fault == [KL_ROW] else "all its rewards are alike"
            raise RuntimeError(
                f"stopped: the gradient of {', '.join(at_fault)} is zero ({why}) and "
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

    def _metrics(
        self,
        report: GradientReport,
        facts: BatchFacts,
        critic_losses: Sequence[float],
        rows: Sequence[str] | None,
    ) -> dict[str, float]:
        """What the log says of an update."""
        seconds = self.phases.total()
        extra = facts.extra | {f"critic_loss/{i}": loss for i, loss in enumerate(critic_losses)}
        extra |= {} if self._backend is None else self._backend.figures()
        return step_metrics(
            report,
            self.rows if rows is None else self.names,
            rows=rows,
            rewards=facts.rewards,
            kl=facts.kl,
            # Every update gets an equal share of the rollout's tokens; the first one holds its time.
            tokens_per_second=facts.tokens / self.updates_per_step / seconds,
            peak_memory_bytes=self.engine.peak_memory(),
            seconds={**self.phases.seconds, "step": seconds},
            extra=extra | ({"kl_beta": self.kl.value} if self.kl.adapts else {}),
        )

    def _elapsed(self) -> float:
        """Seconds of the whole run, those before it was resumed included."""
        return self._seconds_before_resume + time.perf_counter() - self._started
