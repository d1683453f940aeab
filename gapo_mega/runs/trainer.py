"""Training, readable top to bottom: prompts, rollout, rewards, advantages, one aggregated update."""

from __future__ import annotations

import dataclasses
import logging
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoTokenizer, GenerationConfig, PreTrainedTokenizerBase

from gapo_mega import advantages, aggregation, objectives
from gapo_mega.advantages.rewards import token_rewards, whiten
from gapo_mega.aggregation.base import ZeroGradientError
from gapo_mega.config import Config
from gapo_mega.config.loading import dump
from gapo_mega.data.prompts import PromptSchedule, load_prompts
from gapo_mega.engine.base import Engine, GradientReport, SamplingParameters
from gapo_mega.evaluation.correlation import reward_correlation
from gapo_mega.losses import policy_loss_of, value_loss_sum
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.rollout.collect import Collector
from gapo_mega.rollout.heldout import Answers, HeldOut
from gapo_mega.rollout.score import Scorer
from gapo_mega.runs.checkpoints import (
    CheckpointFolder,
    StopOnSignal,
    any_replica,
    checkpoint_to_resume,
    is_due,
)
from gapo_mega.runs.finish import finish
from gapo_mega.runs.log import RunLog, step_metrics
from gapo_mega.runs.preflight import check
from gapo_mega.types import Experience, Prompt, Rollout

logger = logging.getLogger(__name__)


class Trainer:
    """One run. Every rank builds one; only rank 0 writes files."""

    def __init__(
        self,
        config: Config,
        engine: Engine,
        tokenizer: PreTrainedTokenizerBase,
        train_prompts: list[Prompt],
        heldout_prompts: list[Prompt],
    ) -> None:
        self.config = config
        self.engine = engine
        self.directory = Path(config.output_dir)
        self.names = [objective.name for objective in config.objectives]
        self.aggregator = aggregation.build(config.aggregation.name, **config.aggregation.options)
        self.estimator = advantages.build(config.advantages.name, **config.advantages.options)
        self.seconds: dict[str, float] = {}
        rollout = config.rollout
        sampling = SamplingParameters(
            rollout.max_new_tokens,
            rollout.temperature,
            rollout.top_k,
            rollout.top_p,
            rollout.repetition_penalty,
        )
        self.collector = Collector(engine.generator, tokenizer, sampling)
        self.scorer = Scorer(
            engine,
            self._objectives(),
            config.algorithm,
            token_rewards,
            self.estimator.needs_values,
            self._phase,
        )
        layout = engine.layout
        self.schedule = PromptSchedule(
            train_prompts,
            rollout.prompts_per_step,
            layout.data_rank,
            layout.data,
            config.seed,
            shuffle=config.data.shuffle,
        )
        self.heldout = HeldOut(
            engine, self.collector, self.scorer, heldout_prompts, config.evaluation, config.seed
        )
        self.checkpoints = CheckpointFolder(
            self.directory / "checkpoints", config.checkpoint.keep, layout, engine.barrier
        )
        self.updates_per_step = config.algorithm.ppo_epochs * config.algorithm.minibatches
        self.log = RunLog(
            self.directory, self.names, config.logging, config.steps * self.updates_per_step, layout.is_main
        )
        self.step = 0  # rollout steps done
        self.skipped_in_a_row = 0
        self.before: Answers | None = None
        self.seconds_before_resume = 0.0
        self.started = time.perf_counter()

    def run(self, with_report: bool = True) -> None:
        """Train to ``config.steps``, or until SIGTERM; then write the exported model and the report."""
        self._resume()
        if self.before is None:
            self.before = self.heldout.answer()
        self.log.truncate_after(self.step * self.updates_per_step)
        with StopOnSignal() as stop:
            while self.step < self.config.steps:
                self._train_step()
                self.step += 1
                if any_replica(self.engine, stop.requested):
                    self._save()
                    self.log.close()
                    logger.warning(
                        "stopped by a signal after step %d; the same command goes on from there", self.step
                    )
                    return
                if is_due(self.config.checkpoint, self.step, self.config.steps):
                    self._save()
            self.log.close()
            if with_report:  # a signal does not interrupt it: what was trained is not lost
                finish(self.config, self.engine, self.names, self.before, self.heldout, self._elapsed)

    def _objectives(self) -> list[objectives.Objective]:
        """The objectives; those that score with a model of the engine's have it."""
        built = [objectives.build(objective) for objective in self.config.objectives]
        for objective in built:
            if objective.wanted_model is not None:
                objective.attach(self.engine.score_model(objective.wanted_model))
        return built

    # -- one step ----------------------------------------------------------------------------------
    def _train_step(self) -> None:
        """Roll out, score, estimate advantages, and update once per minibatch."""
        self.seconds.clear()
        started = time.perf_counter()
        with self._phase("rollout"):
            self.engine.generator.update_weights()
            seed = self.config.seed * 1_000_003 + self.step
            rollout = self.collector.collect(
                self.schedule.next(),
                self.config.rollout.samples_per_prompt,
                seed * self.engine.layout.data + self.engine.layout.data_rank,
            )
        experience = self.estimator(self.scorer.score(rollout))
        if self.config.advantages.whiten:
            assert experience.advantages_MBT is not None
            whitened = whiten(
                experience.advantages_MBT, experience.response_mask_BT, self.engine.sum_over_data
            )
            experience = dataclasses.replace(experience, advantages_MBT=whitened)
        facts = self._batch_facts(rollout, experience)
        order = torch.Generator().manual_seed(seed)
        update = self.step * self.updates_per_step
        for _ in range(self.config.algorithm.ppo_epochs):
            for minibatch in experience.minibatches(self.config.algorithm.minibatches, order):
                critic = self._update_critic(minibatch)
                report = self._update_policy(minibatch)
                update += 1
                self._record(update, report, facts, critic, time.perf_counter() - started)
                self._check_finite(report, update)
                self.seconds.clear()
                started = time.perf_counter()

    def _update_policy(self, minibatch: Experience) -> GradientReport:
        try:
            return self.engine.update_policy(minibatch, self._policy_loss, self.aggregator)
        except ZeroGradientError as error:
            at_fault = ", ".join(self.names[i] for i in error.objectives)
            raise RuntimeError(
                f"stopped: the gradient of {at_fault} is zero (all its rewards are alike) and "
                "aggregation.options.zero_gradient is 'stop'"
            ) from error

    def _policy_loss(self, logprobs_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        return policy_loss_of(logprobs_BT, batch, objective, self.config.algorithm.clip_epsilon)

    def _value_loss(self, values_BT: Tensor, batch: Experience, objective: int) -> Tensor:
        assert batch.values_MBT is not None and batch.returns_MBT is not None
        return value_loss_sum(
            values_BT,
            batch.values_MBT[objective],
            batch.returns_MBT[objective],
            batch.response_mask_BT,
            self.config.algorithm.value_clip,
        )

    def _update_critic(self, minibatch: Experience) -> dict[str, float]:
        if not self.estimator.needs_values:
            return {}
        with self._phase("critic"):
            losses = self.engine.update_critic(minibatch, self._value_loss)
        return {f"critic_loss/{i}": loss for i, loss in enumerate(losses)}

    def _check_finite(self, report: GradientReport, update: int) -> None:
        """Name objectives without a usable gradient; stop after too many skipped updates in a row."""
        if report.excluded:
            names = ", ".join(self.names[i] for i in report.excluded)
            logger.warning(
                "update %d: the gradient of %s is zero, left out of the combination", update, names
            )
        if not report.skipped:
            self.skipped_in_a_row = 0
            return
        self.skipped_in_a_row += 1
        at_fault = ", ".join(self.names[i] for i in report.nonfinite) or "the combination"
        logger.warning("update %d skipped: the gradient of %s is not finite", update, at_fault)
        limit = self.config.gradients.max_nonfinite_steps
        if self.skipped_in_a_row >= limit:
            raise RuntimeError(
                f"stopped: the gradient of {at_fault} was not finite in {limit} updates in a row "
                "(gradients.max_nonfinite_steps)"
            )

    # -- measurements ------------------------------------------------------------------------------
    @contextmanager
    def _phase(self, name: str) -> Iterator[None]:
        """Add the wall time of the block to phase ``name`` of the current update."""
        started = time.perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + time.perf_counter() - started

    def _batch_facts(self, rollout: Rollout, experience: Experience) -> dict[str, Any]:
        """Means over the whole step's batch, on all data-parallel ranks."""
        mask_BT = experience.response_mask_BT
        kl_BT = (experience.old_logprobs_BT - experience.ref_logprobs_BT) * mask_BT
        sums = torch.cat(
            [
                experience.scores_MB.double().sum(dim=1),
                torch.stack(
                    [
                        kl_BT.double().sum(),
                        mask_BT.sum().double(),
                        torch.tensor(float(rollout.batch_size), dtype=torch.float64),
                        rollout.prompt_lengths_B.sum().double(),
                        rollout.finished_B.sum().double(),
                    ]
                ),
            ]
        )
        *scores, kl, tokens, rows, prompt_tokens, finished = self.engine.sum_over_data(sums).tolist()
        facts: dict[str, Any] = {
            "rewards": [score / rows for score in scores],
            "kl": kl / max(tokens, 1.0),
            "tokens": tokens + prompt_tokens,
            "extra": {
                "prompt_length": prompt_tokens / rows,
                "response_length": tokens / rows,
                "finished": finished / rows,
            },
        }
        if len(self.names) > 1 and self.config.rollout.samples_per_prompt > 1:
            gathered = self.engine.gather_over_data((experience.scores_MB, experience.group_B))
            groups = [group_B + 1_000_000 * rank for rank, (_, group_B) in enumerate(gathered)]
            matrix = reward_correlation(torch.cat([s for s, _ in gathered], dim=1), torch.cat(groups))
            for i, first in enumerate(self.names):
                for j in range(i + 1, len(self.names)):
                    facts["extra"][f"reward_correlation/{first}/{self.names[j]}"] = float(matrix[i, j])
        return facts

    def _record(
        self,
        update: int,
        report: GradientReport,
        facts: dict[str, Any],
        critic: dict[str, float],
        seconds: float,
    ) -> None:
        for index, name in enumerate(self.names):
            for kind in ("forward_backward", "backward"):
                if f"{kind}/{index}" in report.seconds:
                    report.seconds[f"{kind}/{name}"] = report.seconds.pop(f"{kind}/{index}")
        metrics = step_metrics(
            report,
            self.names,
            rewards=facts["rewards"],
            kl=facts["kl"],
            # The rollout's tokens are shared out over its updates, the first of which holds its time.
            tokens_per_second=facts["tokens"] / self.updates_per_step / seconds,
            peak_memory_bytes=self.engine.peak_memory(),
            seconds={**self.seconds, "step": seconds},
            extra={**facts["extra"], **critic},
        )
        self.log.write(update, metrics)

    def _elapsed(self) -> float:
        return self.seconds_before_resume + time.perf_counter() - self.started

    # -- checkpoints -------------------------------------------------------------------------------
    def _save(self) -> None:
        """A complete checkpoint of the current step; all ranks call it."""
        extra = {
            "step": self.step,
            "schedule": self.schedule.state_dict(),
            "aggregator": self.aggregator.state_dict(),
            "skipped_in_a_row": self.skipped_in_a_row,
            "before": dataclasses.asdict(self.before) if self.before else None,
            "seconds": self._elapsed(),
        }
        self.checkpoints.save(self.step, lambda directory: self.engine.save(directory, extra))

    def _resume(self) -> None:
        """Continue from the newest complete checkpoint, when there is one and the run asks for it."""
        latest = checkpoint_to_resume(self.checkpoints, self.config.checkpoint, self.engine)
        if latest is None:
            return
        extra = self.engine.load(latest)
        self.step = int(extra["step"])
        self.schedule.load_state_dict(extra["schedule"])
        self.aggregator.load_state_dict(extra["aggregator"])
        self.skipped_in_a_row = int(extra["skipped_in_a_row"])
        self.before = Answers(**extra["before"]) if extra["before"] else None
        self.seconds_before_resume = float(extra["seconds"])
        logger.info("resumed from %s: %d of %d steps done", latest, self.step, self.config.steps)


def train(config: Config, with_report: bool = True) -> None:
    """Run a whole training on this process's share of the world (torchrun's environment, or alone).

    ``with_report`` false leaves out what follows the last step: exported model, held-out answers, report.
    Everything that can be refused is refused before a model is built. Raises ``ValueError``.
    """
    shape = check(config, int(os.environ.get("WORLD_SIZE", "1")))
    source = model_location.resolve(config.model.path)
    companions = model_location.companions_of(source)
    tokenizer = AutoTokenizer.from_pretrained(companions)
    train_prompts, heldout_prompts = load_prompts(config.data, tokenizer, config.seed)
    # Refuses more prompts a step than there are; the trainer builds its own for its data rank.
    PromptSchedule(train_prompts, config.rollout.prompts_per_step, 0, 1, config.seed)
    eos_ids = end_of_sequence_ids(companions, tokenizer)
    estimator = advantages.build(config.advantages.name, **config.advantages.options)
    # Imported last: Megatron takes seconds to load, and bad input should be told at once.
    from gapo_mega.engine.megatron.engine import MegatronEngine

    pad_id = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else eos_ids[0]
    engine = MegatronEngine(
        config, shape, source, pad_id=pad_id, eos_ids=eos_ids, with_critic=estimator.needs_values
    )
    if engine.layout.is_main:
        dump(config, Path(config.output_dir) / "config.yaml")
    Trainer(config, engine, tokenizer, train_prompts, heldout_prompts).run(with_report)
    # Not after an error: closing waits for ranks that are still in a collective, and hides the error.
    engine.close()


def end_of_sequence_ids(source: Path, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """What ends a response: the model's generation settings where it has them, else the tokenizer."""
    ids: Any = None
    if (source / "generation_config.json").is_file():
        ids = GenerationConfig.from_pretrained(source).eos_token_id
    ids = tokenizer.eos_token_id if ids is None else ids
    if ids is None:
        raise ValueError(
            f"model.path: {source} names no end-of-sequence token; accepted: a model whose tokenizer has one"
        )
    return list(ids) if isinstance(ids, list) else [int(ids)]
