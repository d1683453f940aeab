"""Supervised training of one model: score models on pairs, language models on chats.

``SupervisedEngine`` in ``engine/base.py`` defines the layout of a batch.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, ClassVar

import torch
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gapo_mega.engine.base import SupervisedSetup, SupervisedUpdate
from gapo_mega.engine.megatron.checkpoint import adapter, weights
from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.engine.megatron.checkpoint.background import BackgroundSave, HeldFiles
from gapo_mega.engine.megatron.model import lora
from gapo_mega.engine.megatron.model.build import build_chunks
from gapo_mega.engine.megatron.model.forward import forward_backward, forward_only, split
from gapo_mega.engine.megatron.model.logprobs import Backwards, Distribution, Wanted
from gapo_mega.engine.megatron.model.microbatches import Microbatches
from gapo_mega.engine.megatron.model.optimizer import make_trainable
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.files import local
from gapo_mega.losses.preference import bradley_terry_sum
from gapo_mega.models.adapters import settings_of
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.models.huggingface.writing import copy_companions, set_config, write_template
from gapo_mega.models.score_head import ScoreHead
from gapo_mega.types import TokenBatch

_NAME = "model"  # in checkpoints


class SupervisedModel(groups.Collective, ABC):
    """What both kinds of ``SupervisedEngine`` share; subclasses define model and loss."""

    rows_together: ClassVar[int] = 1  # consecutive rows that a loss takes together

    def __init__(
        self,
        setup: SupervisedSetup,
        head: ScoreHead | None = None,
        existing: groups.Groups | None = None,
    ) -> None:
        """Build the model and load its weights.

        ``head``: the source's score head, if it has one. ``existing``: process groups of this layout; None
        makes them.
        """
        self._setup = setup
        self._loads = 0
        super().__init__(existing or groups.of_layout(setup.parallel))
        groups.seed(setup.seed)
        with megatron_device():
            chunks = build_chunks(setup.shape, setup.model, setup.parallel, self._value_heads())
            for chunk in chunks:
                weights.load(chunk, setup.shape, setup.source, head)
            self._attach_adapters(chunks)
            for chunk in chunks:
                self._prepare(chunk)
            self._trainable = make_trainable(chunks, setup.optimizer, setup.total_steps)

    def _attach_adapters(self, chunks: Sequence[GPTModel]) -> None:
        setup, settings = self._setup, self._setup.lora
        if settings is None:
            return
        lora.attach(chunks, setup.shape, settings, setup.seed)
        if settings.path is not None:
            adapter.load(chunks, setup.shape, settings, local(settings.path))

    def update(self, batch: TokenBatch) -> SupervisedUpdate:
        """Accumulates gradients over microbatches and skips the step if the gradient is not finite."""
        count = float(self.sum_over_data(self._count(batch)))

        def mean_loss(output: Tensor, part: TokenBatch) -> tuple[Tensor, Tensor]:
            total, right = self._loss_sum(output, part)
            return total / count, torch.stack([total.detach(), right])

        self._trainable.zero_grad()
        with megatron_device():
            parts = self._microbatches(batch).parts
            chunks = self._trainable.chunks
            part = forward_backward(chunks, parts, mean_loss, logged_numbers=2, policy=self._policy())
            sums = self.sum_over_data(self.groups.from_last_stage(part)).tolist()
            rate = float(self._trainable.optimizer.param_groups[0]["lr"])
            norm = self._trainable.grad_norm()
            skipped = not math.isfinite(norm)
            if skipped:
                self._trainable.zero_grad()
            else:
                self._trainable.step()
        return SupervisedUpdate(sums[0] / count, sums[1] / count, norm, rate, skipped)

    def measure(self, batch: TokenBatch) -> Tensor:
        if not batch.batch_size:
            return torch.zeros(0)
        pieces = self._microbatches(batch)
        with megatron_device():
            chunks = self._trainable.chunks
            parts = forward_only(chunks, pieces.parts, self._measured, policy=self._policy())
        found = [part.cpu() for part in parts]
        local_B = pieces.rejoin_rows(found) if found else torch.zeros(batch.batch_size)
        return self.groups.from_last_stage(local_B)

    def _microbatches(self, batch: TokenBatch) -> Microbatches[TokenBatch]:
        return split(self._trainable.chunks, batch, self._setup.micro_batch, self.rows_together)

    # -- persistence -------------------------------------------------------------------------------
    @property
    def changes(self) -> int:
        return self._loads + self._trainable.begun

    def is_finite(self) -> bool:
        self.gather_parameters()
        return self.everywhere(self._trainable.is_finite())

    def save_in_background(self, directory: Path, extra: dict[str, Any]) -> BackgroundSave:
        held = HeldFiles(directory)
        self.save(directory, extra, held)
        return BackgroundSave(directory, held, self.everywhere)

    def save(self, directory: Path, extra: dict[str, Any], writer: HeldFiles | None = None) -> None:
        """Rank 0 also writes configuration, tokenizer and chat template, for a conversion."""
        head = self._head_out()
        about_head = None if head is None else asdict(head)
        settings = self._setup.lora
        checkpoint.save(
            directory,
            {_NAME: self._trainable},
            extra,
            self.groups,
            about_head,
            lora=None if settings is None else settings_of(settings),
            writer=writer,
        )
        if self.layout.is_main:
            folder = directory / model_location.COMPANIONS
            copy_companions(model_location.companions_of(self._setup.source), folder)
            write_template(folder, self._setup.chat_template)
            set_config(folder / "config.json", self._setup.config, self._trainable.dtype)

    def load(self, directory: Path) -> dict[str, Any]:
        self._loads += 1
        return checkpoint.load(directory, {_NAME: self._trainable}, self.groups)

    def gather_parameters(self) -> None:
        with megatron_device():
            self._trainable.gather_parameters()

    def export_hf(self, directory: Path) -> None:
        """Replaces ``directory`` if it exists; rank 0 adds the chat template."""
        with megatron_device():
            self._trainable.gather_parameters()
            weights.export_hf(
                self._trainable.modules,
                self._setup.shape,
                model_location.companions_of(self._setup.source),
                directory,
                head=self._head_out(),
                config=self._setup.config,
                overwrite=True,
            )
        if self.layout.is_main:
            write_template(directory, self._setup.chat_template)

    def export_adapter(self, directory: Path) -> None:
        """Of a score model with its head, which is trained beside the adapters."""
        settings, base = self._setup.lora, self._setup.model.path
        assert settings is not None, "the configuration refuses it without adapters"
        with megatron_device():
            self._trainable.gather_parameters()
            chunks, head = self._trainable.modules, self._head_out()
            adapter.export(chunks, self._setup.shape, settings, base, directory, head)

    # -- what subclasses define --------------------------------------------------------------------
    @abstractmethod
    def _value_heads(self) -> int | None:
        """Outputs per position; ``None`` for a language model."""

    @abstractmethod
    def _count(self, batch: TokenBatch) -> Tensor:
        """Number of pairs or tokens that the loss is a mean over, in this data rank's batch."""

    @abstractmethod
    def _loss_sum(self, output: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Sum of the loss with its graph, and the number of pairs in the right order.

        ``output`` ``[B, T, X]`` or, with a ``_policy``, log-probabilities ``[B, T]``; ``_measured``, too.
        """

    @abstractmethod
    def _measured(self, output: Tensor, batch: TokenBatch) -> Tensor:
        """``[B]`` scores or log-likelihoods of a microbatch, with a graph in training."""

    @abstractmethod
    def _prepare(self, model: Any) -> None:
        """Change the model, which may have adapters, before it is wrapped for training."""

    @abstractmethod
    def _policy(self) -> Wanted | None:
        """What a forward gives of the marked tokens; ``None``: the outputs at all positions."""

    @abstractmethod
    def _head_out(self) -> ScoreHead | None:
        """The head that a trained score model is exported with; ``None`` for a language model."""


class PairEngine(SupervisedModel):
    """A score model with the Bradley-Terry loss. ``micro_batch`` counts rows, two per pair."""

    rows_together = 2

    def __init__(
        self,
        setup: SupervisedSetup,
        *,
        head: ScoreHead | None,
        center: float,
        pad_id: int,
        existing: groups.Groups | None = None,
    ) -> None:
        assert setup.micro_batch % 2 == 0, "pairs are not divided"
        self._center = center
        self._pad_id = pad_id
        super().__init__(setup, head, existing)

    def _value_heads(self) -> int:
        return 1

    def _prepare(self, model: Any) -> None:
        if model.post_process:
            # A bias shifts all scores alike: no preference determines it. Classifiers of transformers have
            # none.
            model.output_layer.bias.requires_grad_(False)
            model.output_layer.weight.requires_grad_(True)  # beside adapters, too: a new head knows nothing

    def _policy(self) -> None:
        return None  # a value head is no work

    def _head_out(self) -> ScoreHead:
        return ScoreHead("score.weight", skip_padding_id=self._pad_id)

    def _count(self, batch: TokenBatch) -> Tensor:
        return torch.tensor(batch.batch_size / 2, dtype=torch.float64)

    def _loss_sum(self, output: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        chosen_P, rejected_P = self._measured(output, batch).view(-1, 2).unbind(dim=1)
        # A tie is half right, as in the held-out accuracy.
        right = ((chosen_P - rejected_P).sign() + 1).sum() / 2
        return bradley_terry_sum(chosen_P, rejected_P, self._center), right.detach()

    def _measured(self, output: Tensor, batch: TokenBatch) -> Tensor:
        return output[..., 0][batch.response_mask_BT].float()


class ChatEngine(SupervisedModel):
    """A language model with the cross entropy of the marked tokens."""

    def _value_heads(self) -> None:
        return None

    def _prepare(self, model: Any) -> None:
        pass

    def _head_out(self) -> None:
        return None

    def _count(self, batch: TokenBatch) -> Tensor:
        return batch.response_mask_BT.sum().double()

    def _loss_sum(self, output: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        total = -self._measured(output, batch).sum()
        return total, torch.zeros((), device=total.device)

    def _measured(self, output: Tensor, batch: TokenBatch) -> Tensor:
        return output.sum(dim=1)

    def _policy(self) -> Wanted:
        distribution = Distribution(self._setup.shape.vocab)
        return Wanted(distribution, Backwards(last=True), chunk=self._setup.chunk)
