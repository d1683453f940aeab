"""``gapo-mega train-pairs``: a policy from preference pairs of several objectives, without rollouts."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from transformers import PreTrainedTokenizerBase

from gapo_mega import advantages
from gapo_mega.aggregation.base import ZeroGradientError
from gapo_mega.config import Config, DataConfig, ObjectiveConfig, RolloutConfig
from gapo_mega.config.loading import explain
from gapo_mega.config.results import TrainCheckpointConfig
from gapo_mega.config.sections import PolicyConfig, TrainLoggingConfig
from gapo_mega.config.supervised import PairsConfig
from gapo_mega.data.encoding import AnswerIds, encode_answers
from gapo_mega.data.pairs import Pair, errors_of, load_objectives
from gapo_mega.data.token_cache import TokenCache
from gapo_mega.engine.base import Engine, GradientReport, build_engine
from gapo_mega.models.shape import ModelShape
from gapo_mega.planning.layout import check_gradients, check_model_split
from gapo_mega.planning.resolved import ModelSource, ResolvedRun
from gapo_mega.runs.data_run import DataRun, Start
from gapo_mega.runs.metrics import step_metrics
from gapo_mega.runs.pair_steps import Measured, Pairs, WeightedLogprobs, experience_of, measure
from gapo_mega.runs.phases import Phases
from gapo_mega.runs.preflight import build_aggregator
from gapo_mega.runs.processes import world_size
from gapo_mega.types import Experience

logger = logging.getLogger(__name__)

Encoded = list[tuple[AnswerIds, float]]  # pairs, each with its margin


def engine_config(config: PairsConfig, steps: int) -> Config:
    """The same run in the words of a training: what the engine and its gradient strategies read.

    A "prompt" is one pair of every objective, whose responses are its samples. Raises ``ValueError`` for
    sections that do not go together.
    """
    objectives = [ObjectiveConfig(name=objective.name) for objective in config.objectives]
    source, longest = config.objectives[0].data.source, config.model.max_tokens
    samples = 2 * len(objectives)
    model = {name: value for name, value in config.model if name in PolicyConfig.model_fields}
    try:
        return Config(
            output_dir=config.output_dir,
            seed=config.seed,
            steps=steps,
            micro_batch_size=2 * config.micro_batch_size,
            model=PolicyConfig(**model),
            parallel=config.parallel,
            data=DataConfig(source=source, max_prompt_tokens=longest - 1),
            rollout=RolloutConfig(
                prompts_per_step=config.batch_size, samples_per_prompt=samples, max_new_tokens=1
            ),
            objectives=objectives,
            aggregation=config.aggregation,
            optimizer=config.optimizer,
            gradients=config.gradients,
            checkpoint=TrainCheckpointConfig(**dict(config.checkpoint)),
            logging=TrainLoggingConfig(**dict(config.logging)),
        )
    except ValidationError as error:  # of sections that do not go together
        raise ValueError(explain(error, Config)[0]) from None


def resolve(config: PairsConfig, shape: ModelShape, processes: int, steps: int = 1) -> ResolvedRun:
    """The run on ``processes`` processes. Raises ``ValueError`` for the first thing that does not fit."""
    words = engine_config(config, steps)
    data_ranks = check_model_split(words.parallel, shape, words.model.dtype, processes)
    check_gradients(words, shape, data_ranks)
    return ResolvedRun(
        config=words,
        world=processes,
        policy=ModelSource(config.model.path, shape),
        critic=None,
        objectives=[],
        score_models=[],
        aggregator=build_aggregator(words),
        estimator=advantages.build("group"),  # of rollouts, which there are none of
        loss=WeightedLogprobs(),
    )


class PairsRun(DataRun[PairsConfig, Engine]):
    """Trains a policy on every objective's own pairs; gradients are combined as in ``gapo-mega train``."""

    command = "gapo-mega train-pairs"

    @classmethod
    def check(cls, config: PairsConfig, world_size: int) -> Start:
        start = super().check(config, world_size)
        resolve(config, start.shape, world_size)
        return start

    @property
    def names(self) -> list[str]:
        return [objective.name for objective in self.config.objectives]

    def _load(self, tokenizer: PreTrainedTokenizerBase, cache: TokenCache) -> Sequence[int]:
        model = self.config.model

        def encoded(sets: Sequence[list[Pair]]) -> Iterator[Encoded]:
            for index, pairs in enumerate(sets):
                with errors_of(index):
                    found = encode_answers(pairs, tokenizer, model.chat_template, model.max_tokens, cache)
                yield [(both, pair.margin) for both, pair in zip(*found, strict=True)]

        train, heldout = load_objectives(self.config.objectives, self.config.seed)
        self._train, self._heldout = list(encoded(train)), list(encoded(heldout))
        return [len(pairs) for pairs in self._train]

    def _rows(self) -> tuple[Iterable[object], Iterable[object]]:
        def of(sets: Sequence[Encoded]) -> Iterator[object]:
            for name, pairs in zip(self.names, sets, strict=True):
                for (chosen, rejected), margin in pairs:
                    yield name, *chosen, *rejected, margin

        return of(self._train), of(self._heldout)

    def _build(self) -> Engine:
        config, start = self.config, self.start
        resolved = resolve(config, start.shape, world_size(), self.total_steps)
        self.aggregator, self.loss = resolved.aggregator, resolved.loss
        self.phases = Phases()
        pad = start.pad_id  # nothing is generated
        return build_engine(resolved, pad_id=pad, eos_ids=[pad], chat_template=self._template())

    # -- a step --------------------------------------------------------------------------------------
    def train_step(self, step: int) -> dict[str, float]:
        """One optimizer step on ``batch_size`` pairs of every objective."""
        self.phases.restart()
        chosen = [
            [pairs[i] for i in order.items(step)]
            for pairs, order in zip(self._train, self.orders, strict=True)
        ]
        pairs = Pairs.of(chosen, self.start.pad_id)
        measured, experience = self._measure(pairs)
        facts = self._means(measured)
        report = self._update(experience)
        report = dataclasses.replace(report, losses=facts.pop("loss"))
        done = step + 1
        metrics = self._metrics(report, facts, pairs)
        self.skips.take(report, done)
        return self._unless_too_many(done, metrics)

    def _measure(self, pairs: Pairs) -> tuple[Measured, Experience]:
        with self.phases("reference"):
            reference_BT = self.engine.logprobs(pairs.batch, "reference")
        with self.phases("policy"):
            policy_BT = self.engine.logprobs(pairs.batch, "policy")
        weights = [objective.weight for objective in self.config.objectives]
        measured = measure(pairs, policy_BT, reference_BT, self.config.loss, weights)
        return measured, experience_of(pairs, measured, policy_BT, reference_BT, self.engine.sum_over_data)

    def _means(self, measured: Measured) -> dict[str, list[float]]:
        """Of every objective, over the pairs of all data ranks."""
        facts = measured.facts()
        sums = self.engine.sum_over_data(torch.stack(list(facts.values())))
        return dict(zip(facts, (sums / self.config.batch_size).tolist(), strict=True))

    def _update(self, experience: Experience) -> GradientReport:
        try:
            return self.engine.update_policy(experience, self.loss, self.aggregator)
        except ZeroGradientError as error:
            at_fault = ", ".join(self.names[i] for i in error.objectives)
            raise RuntimeError(
                f"stopped: the gradient of {at_fault} is zero and aggregation.options.zero_gradient is 'stop'"
            ) from error

    def _metrics(
        self, report: GradientReport, facts: Mapping[str, Sequence[float]], pairs: Pairs
    ) -> dict[str, float]:
        tokens = float(self.engine.sum_over_data(pairs.batch.lengths_B.sum().double()))
        seconds = self.phases.total()
        extra = {
            f"{key}/{name}": value
            for key, values in facts.items()
            for name, value in zip(self.names, values, strict=True)
        }
        return step_metrics(
            report,
            self.names,
            tokens_per_second=tokens / seconds,
            peak_memory_bytes=self.engine.peak_memory(),
            seconds={**self.phases.seconds, "step": seconds},
            extra=extra,
        )

    # -- held-out data -------------------------------------------------------------------------------
    def evaluate(self) -> dict[str, float]:
        """Loss, accuracy and rewards on the held-out pairs, ``KEY/NAME``."""
        found: dict[str, float] = {}
        for objective, (name, pairs) in enumerate(zip(self.names, self._heldout, strict=True)):
            if pairs:
                found[f"pairs/{name}"] = float(len(pairs))
                found |= {f"{key}/{name}": value for key, value in self._evaluate(objective, pairs).items()}
        return found

    def _evaluate(self, objective: int, pairs: Encoded) -> dict[str, float]:
        lengths = [max(len(ids) for ids, _ in both) for both, _ in pairs]
        sums: dict[str, float] = {}
        for items, counts in self._own(len(pairs), lengths):
            batch = Pairs.of([[pairs[i] for i in items]], self.start.pad_id)
            reference_BT = self.engine.logprobs(batch.batch, "reference")
            policy_BT = self.engine.logprobs(batch.batch, "policy")
            weights = [self.config.objectives[objective].weight]
            facts = measure(batch, policy_BT, reference_BT, self.config.loss, weights).facts()
            for key, value_M in facts.items() if counts else ():
                sums[key] = sums.get(key, 0.0) + float(value_M)
        everyone = self.engine.gather_over_data(sums)
        return {
            key: sum(part.get(key, 0.0) for part in everyone) / len(pairs)
            for key in dict.fromkeys(key for part in everyone for key in part)
        }

    # -- what a checkpoint holds -----------------------------------------------------------------------
    def state_dict(self) -> dict[str, Any]:
        """Also the memory of the aggregator."""
        return {**super().state_dict(), "aggregator": self.aggregator.state_dict()}

    def load_state_dict(self, state: Mapping[str, Any], checkpoint: Path) -> None:
        """Inverse of ``state_dict``. Raises ``ValueError`` for other data or another aggregator."""
        super().load_state_dict(state, checkpoint)
        self.aggregator.load_state_dict(state["aggregator"])
