"""The ``Engine`` and ``BenchmarkEngine`` of ``engine/base.py`` over Megatron-core."""

from __future__ import annotations

import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gapo_mega.engine.base import (
    Aggregator,
    GradientReport,
    PolicyLossSum,
    SamplingParameters,
    ValueLoss,
)
from gapo_mega.engine.megatron.checkpoint import adapter, weights
from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.engine.megatron.checkpoint.background import BackgroundSave, HeldFiles
from gapo_mega.engine.megatron.critic import Critics
from gapo_mega.engine.megatron.generation.generate import MegatronGenerator
from gapo_mega.engine.megatron.gradients import strategies
from gapo_mega.engine.megatron.gradients.averages import AveragedRows
from gapo_mega.engine.megatron.gradients.update import GradientStrategy
from gapo_mega.engine.megatron.model import lora
from gapo_mega.engine.megatron.model.build import build_chunks, build_gpt
from gapo_mega.engine.megatron.model.forward import Chunks, batch_logprobs
from gapo_mega.engine.megatron.model.frozen import FrozenModel
from gapo_mega.engine.megatron.model.logprobs import Distribution
from gapo_mega.engine.megatron.model.optimizer import Trainable, make_trainable
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import device, megatron_device
from gapo_mega.engine.megatron.score import ScoreModel
from gapo_mega.files import local
from gapo_mega.models.adapters import settings_of
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.models.huggingface.writing import copy_companions, write_template
from gapo_mega.objectives.base import ScoreModelRequest, TokenScorer
from gapo_mega.planning.chunks import logits_chunk
from gapo_mega.planning.resolved import ResolvedRun
from gapo_mega.types import Experience, TokenBatch


class MegatronEngine(groups.Collective):
    """Policy, reference, critics, generator and gradients of one run on this rank."""

    def __init__(
        self,
        resolved: ResolvedRun,
        *,
        pad_id: int,
        eos_ids: list[int],
        chat_template: str | None = None,
        existing: groups.Groups | None = None,
    ) -> None:
        """Build every model of the run and load its weights.

        Args:
            pad_id, eos_ids: the policy tokenizer's.
            chat_template: Jinja text to store with the trained model; None: the source's own.
            existing: process groups of this layout from an earlier engine; None makes them.
        """
        self._config = config = resolved.config
        self.shape = shape = resolved.shape
        self._source = resolved.policy.directory()
        self._chat_template = chat_template
        self._other_changes = 0  # than by optimizer steps
        # Both before a model is built: a download may fail.
        critic = None if resolved.critic is None else resolved.critic.directory()
        super().__init__(existing or groups.of_layout(config.parallel))
        groups.seed(config.seed)
        with megatron_device():
            chunks = build_chunks(shape, config.model, config.parallel)
            self._load(chunks, self._source)
            self._attach_adapters(chunks)
            self.policy = make_trainable(chunks, config.optimizer, resolved.total_updates)
            self.reference = self._own_reference()
            self.critics = None if critic is None else self._critics(resolved, critic)
            self.gradients = self._strategy(resolved, config.rows)
            self.audited = self._strategy(resolved, config.audited_rows) if config.audited_rows else None
        self.generator = MegatronGenerator(
            self.policy.modules,
            self.groups,
            vocabulary=shape.vocab,
            pad_id=pad_id,
            eos_ids=eos_ids,
            batch_size=config.rollout.batch_size,
            gather=self.policy.gather_parameters,
        )

    # -- building ----------------------------------------------------------------------------------
    def _load(self, chunks: Sequence[GPTModel], source: Path) -> None:
        for chunk in chunks:
            weights.load(chunk, self.shape, source)

    def _attach_adapters(self, chunks: Sequence[GPTModel]) -> None:
        settings = self._config.model.lora
        if settings is None:
            return
        lora.attach(chunks, self.shape, settings, self._config.seed)
        if settings.path is not None:
            adapter.load(chunks, self.shape, settings, local(settings.path))

    def _own_reference(self) -> FrozenModel | None:
        """None: the reference is the policy without its adapters."""
        config = self._config
        if config.model.lora is not None:
            return None
        reference = build_gpt(self.shape, config.model, config.parallel)
        self._load([reference], self._source)
        return FrozenModel(reference, config.model.offload_reference)

    def _strategy(self, resolved: ResolvedRun, rows: Sequence[str]) -> GradientStrategy:
        return strategies.build(resolved, self.policy, self.groups, len(rows))

    def _critics(self, resolved: ResolvedRun, source: Path) -> Critics:
        config, heads = self._config, resolved.value_heads
        models: list[Trainable] = []
        for _ in range(resolved.value_models):
            chunks = build_chunks(self.shape, config.model, config.parallel, value_heads=heads)
            self._load(chunks, source)
            models.append(make_trainable(chunks, config.critic.optimizer, resolved.total_updates))
        size, tokens = config.micro_batch_size, config.micro_batch_tokens
        return Critics(models, heads, self.groups, size, tokens)

    # -- forward -----------------------------------------------------------------------------------
    def logprobs(self, batch: TokenBatch, model: Literal["policy", "reference"]) -> Tensor:
        distribution = Distribution.of(self.shape.vocab, SamplingParameters.of(self._config.rollout))
        size, tokens = self._config.micro_batch_size, self._config.micro_batch_tokens
        chunk = logits_chunk(self._config, self.shape)

        def of(chunks: Chunks) -> Tensor:
            return batch_logprobs(chunks, batch, size, distribution, chunk, tokens)

        with megatron_device():
            if model == "policy":
                local_BT = of(self.policy.chunks)
            elif self.reference is None:
                with lora.switched_off(self.policy.modules):
                    local_BT = of(self.policy.chunks)
            else:
                with self.reference.on_device() as reference:
                    local_BT = of([reference])
        return self.groups.from_last_stage(local_BT)

    def score_model(self, request: ScoreModelRequest) -> TokenScorer:
        with megatron_device():
            return ScoreModel.requested(request, self._config.model, self._config.parallel, self.groups)

    def values(self, batch: TokenBatch) -> Tensor:
        assert self.critics is not None
        with megatron_device():
            return self.critics.values(batch)

    # -- updates -----------------------------------------------------------------------------------
    def update_policy(
        self, minibatch: Experience, loss: PolicyLossSum, aggregator: Aggregator, *, audit: bool = False
    ) -> GradientReport:
        strategy = self.gradients
        if audit:
            assert self.audited is not None, "gradients.audit_every asks for it"
            strategy = self.audited
        with megatron_device():
            return strategy.step(minibatch, loss, aggregator)

    def update_critic(self, minibatch: Experience, loss: ValueLoss) -> list[float]:
        assert self.critics is not None
        with megatron_device():
            return self.critics.update(minibatch, loss)

    # -- measurement --------------------------------------------------------------------------------
    @property
    def device(self) -> torch.device:
        return device()

    def take_strategy(self, resolved: ResolvedRun) -> int:
        self._other_changes += self._averaged
        del self.gradients  # frees the old rows before the new ones are allocated
        with megatron_device():
            self.gradients = self._strategy(resolved, resolved.config.rows)
        return self.gradients.row_bytes

    def resident(self) -> dict[str, int]:
        return self.policy.resident()

    def largest(self, value: int) -> int:
        """Two all-reduces over gloo: within the replica, then over the data ranks."""
        found = torch.tensor(value, dtype=torch.int64)
        for group in (self.groups.replica, self.groups.data):
            dist.all_reduce(found, op=dist.ReduceOp.MAX, group=group)
        return int(found)

    def peak_memory(self) -> int:
        if torch.cuda.is_available():
            return self.largest(torch.cuda.max_memory_allocated())
        # Linux reports KiB.
        return self.largest(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024)

    # -- persistence -------------------------------------------------------------------------------
    def _trainables(self) -> dict[str, Trainable]:
        critics = self.critics.models if self.critics is not None else []
        return {"policy": self.policy, **{f"critic{i}": c for i, c in enumerate(critics)}}

    def _averages(self) -> dict[str, AveragedRows]:
        """The running means of the policy's gradients, if there are any."""
        return {} if self.gradients.averages is None else {"policy": self.gradients.averages}

    @property
    def _averaged(self) -> int:
        """Updates that running means have taken, or begun to take."""
        return sum(averages.begun for averages in self._averages().values())

    @property
    def changes(self) -> int:
        steps = sum(trainable.begun for trainable in self._trainables().values())
        return self._other_changes + steps + self._averaged

    def is_finite(self) -> bool:
        self.gather_parameters()
        return self.everywhere(all(trainable.is_finite() for trainable in self._trainables().values()))

    def save_in_background(self, directory: Path, extra: dict[str, Any]) -> BackgroundSave:
        held = HeldFiles(directory)
        self.save(directory, extra, held)
        return BackgroundSave(directory, held, self.everywhere)

    def save(self, directory: Path, extra: dict[str, Any], writer: HeldFiles | None = None) -> None:
        """Rank 0 also copies the source's configuration and tokenizer into the checkpoint."""
        settings = self._config.model.lora
        checkpoint.save(
            directory,
            self._trainables(),
            extra,
            self.groups,
            averages=self._averages(),
            lora=None if settings is None else settings_of(settings),
            writer=writer,
        )
        if self.layout.is_main:
            companions = directory / model_location.COMPANIONS
            copy_companions(model_location.companions_of(self._source), companions)
            write_template(companions, self._chat_template)

    def load(self, directory: Path) -> dict[str, Any]:
        self._other_changes += 1
        return checkpoint.load(directory, self._trainables(), self.groups, self._averages())

    def gather_parameters(self) -> None:
        with megatron_device():
            for trainable in self._trainables().values():
                trainable.gather_parameters()

    def named_weights(self) -> Iterator[tuple[str, Tensor]]:
        """A tensor lives until the next one is asked for: no rank holds more than its shard and one."""
        with megatron_device():
            self.policy.gather_parameters()
        return weights.hf_stream(self.policy.modules, self.shape)

    def export_hf(self, directory: Path) -> None:
        """Replaces ``directory`` if it exists."""
        with megatron_device():
            self.policy.gather_parameters()
            weights.export_hf(
                self.policy.modules,
                self.shape,
                model_location.companions_of(self._source),
                directory,
                overwrite=True,
            )
        if self.layout.is_main:
            write_template(directory, self._chat_template)

    def export_adapter(self, directory: Path) -> None:
        settings = self._config.model.lora
        assert settings is not None, "the configuration refuses it without adapters"
        with megatron_device():
            self.policy.gather_parameters()
            base = self._config.model.path
            adapter.export(self.policy.modules, self.shape, settings, base, directory)
