"""One model trained on given targets: score models on pairs, language models on chats.

A batch is the tokens and a mask: for pairs the mask marks the token of each row at which the score is
taken, chosen and rejected rows alternating; for chats it marks the tokens to learn.
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from gapo_mega.config import ModelConfig, OptimizerConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import run as checkpoint
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.model.build import build_gpt, make_trainable
from gapo_mega.engine.megatron.model.forward import forward_backward, forward_only
from gapo_mega.engine.megatron.model.logprobs import response_logprobs
from gapo_mega.engine.megatron.runtime import groups
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.losses.preference import bradley_terry_sum
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.models.huggingface.writing import copy_companions, set_config
from gapo_mega.models.score_head import ScoreHead
from gapo_mega.models.shape import ModelShape
from gapo_mega.types import TokenBatch

_NAME = "model"  # in checkpoints


@dataclass(frozen=True)
class Update:
    """What one optimizer step measured, over all data-parallel ranks; the same on every rank."""

    loss: float  # mean over pairs, or over learned tokens
    right: float  # share of pairs whose chosen row has the higher score, ties half; 0 for chats
    gradient_norm: float  # before clipping
    learning_rate: float
    skipped: bool  # True: the gradient was not finite, parameters untouched


class SupervisedEngine(groups.Collective, ABC):
    """Builds the model, loads its weights and trains it.

    Args:
        shape: the model's facts; fewer layers than the source has are its first ones.
        source: Hugging Face directory or Megatron checkpoint.
        model, parallel, optimizer: sections of the configuration.
        total_steps: optimizer steps of the whole run, for the learning-rate schedule.
        micro_batch: rows of a forward pass.
        head: the score head of ``source``, where it has one.
        config: entries of the trained model's ``config.json`` that differ from the source's.
        chat_template: Jinja text that the trained model is to be asked with; none: the source's.
        existing: groups of this layout; none: they are made here.
    """

    def __init__(
        self,
        shape: ModelShape,
        source: Path,
        *,
        model: ModelConfig,
        parallel: ParallelConfig,
        optimizer: OptimizerConfig,
        total_steps: int,
        micro_batch: int,
        seed: int,
        head: ScoreHead | None = None,
        config: Mapping[str, object],
        chat_template: str | None = None,
        existing: groups.Groups | None = None,
    ) -> None:
        self._shape = shape
        self._source = source
        self._micro_batch = micro_batch
        self._config = config
        self._chat_template = chat_template
        super().__init__(existing or groups.initialize(parallel.tensor, parallel.pipeline))
        groups.seed(seed)
        with megatron_device():
            built = build_gpt(shape, model, parallel, self._value_heads())
            weights.load(built, shape, source, head)
            self._prepare(built)
            self._trainable = make_trainable(built, optimizer, total_steps)

    def update(self, batch: TokenBatch) -> Update:
        """One optimizer step on this data rank's rows. Collective."""
        count = float(self.sum_over_data(self._count(batch)))

        def mean_loss(output: Tensor, part: TokenBatch) -> tuple[Tensor, Tensor]:
            total, right = self._loss_sum(output, part)
            return total / count, torch.stack([total.detach(), right])

        self._trainable.zero_grad()
        with megatron_device():
            parts = self._microbatches(batch)
            part = forward_backward(self._trainable.model, parts, mean_loss, logged_numbers=2)
            sums = self.sum_over_data(self.groups.from_last_stage(part)).tolist()
            rate = float(self._trainable.optimizer.param_groups[0]["lr"])
            norm = self._trainable.grad_norm()
            skipped = not math.isfinite(norm)
            if skipped:
                self._trainable.zero_grad()
            else:
                self._trainable.step()
        return Update(sums[0] / count, sums[1] / count, norm, rate, skipped)

    def measure(self, batch: TokenBatch) -> Tensor:
        """Per row of this data rank, float32 on the CPU: ``[B]`` scores, or log-likelihoods of chats."""
        if not batch.batch_size:
            return torch.zeros(0)
        with megatron_device():
            parts = forward_only(self._trainable.model, self._microbatches(batch), self._measured)
        local_B = torch.cat(parts).cpu() if parts else torch.zeros(batch.batch_size)
        return self.groups.from_last_stage(local_B)

    def _microbatches(self, batch: TokenBatch) -> list[TokenBatch]:
        """Each as wide as it has to be: nothing after a row's last mark has any influence.

        Stages of a pipeline exchange tensors of one size, so there all are as wide as the widest.
        """
        parts = batch.split(self._micro_batch)
        if self.layout.pipeline > 1:
            return parts
        return [
            TokenBatch(part.tokens_BT[:, :width], part.response_mask_BT[:, :width])
            for part in parts
            for width in [int(part.response_mask_BT.any(dim=0).nonzero().max()) + 1]
        ]

    # -- persistence -------------------------------------------------------------------------------
    def save(self, directory: Path, extra: dict[str, Any]) -> None:
        """Model, optimizer, schedule, random-number states, and ``extra``. Collective."""
        head = self._head_out()
        about_head = None if head is None else asdict(head)
        checkpoint.save(directory, {_NAME: self._trainable}, extra, self.groups, about_head)
        if self.layout.is_main:
            folder = directory / model_location.COMPANIONS
            copy_companions(model_location.companions_of(self._source), folder)
            self._write_template(folder)
            set_config(folder / "config.json", self._config, self._trainable.model.config.params_dtype)

    def load(self, directory: Path) -> dict[str, Any]:
        """Inverse of ``save``; returns ``extra``."""
        return checkpoint.load(directory, {_NAME: self._trainable}, self.groups)

    def export_hf(self, directory: Path) -> None:
        """The trained model as a Hugging Face directory."""
        with megatron_device():
            weights.export_hf(
                self._trainable.model.module,
                self._shape,
                model_location.companions_of(self._source),
                directory,
                head=self._head_out(),
                config=self._config,
                overwrite=True,
            )
        if self.layout.is_main:
            self._write_template(directory)

    def _write_template(self, directory: Path) -> None:
        if self._chat_template is not None:
            (directory / "chat_template.jinja").write_text(self._chat_template, encoding="utf-8")

    # -- what kinds differ in ----------------------------------------------------------------------
    @abstractmethod
    def _value_heads(self) -> int | None:
        """Outputs per position; ``None`` for a language model."""

    @abstractmethod
    def _count(self, batch: TokenBatch) -> Tensor:
        """What the loss is a mean over."""

    @abstractmethod
    def _loss_sum(self, output: Tensor, batch: TokenBatch) -> tuple[Tensor, Tensor]:
        """Sum of the loss with its graph, and the number of right answers."""

    @abstractmethod
    def _measured(self, output: Tensor, batch: TokenBatch) -> Tensor:
        """See ``measure``."""

    @abstractmethod
    def _prepare(self, model: Any) -> None:
        """Last changes of the model before it is wrapped for training."""

    @abstractmethod
    def _head_out(self) -> ScoreHead | None:
        """The head under which a trained score model is exported."""


class PairEngine(SupervisedEngine):
    """A score model by the Bradley-Terry loss. ``micro_batch`` counts rows: two a pair."""

    def __init__(self, *args: Any, center: float = 0.0, pad_id: int, **kwargs: Any) -> None:
        self._center = center
        self._pad_id = pad_id
        super().__init__(*args, **kwargs)
        assert self._micro_batch % 2 == 0, "pairs are not divided"

    def _value_heads(self) -> int:
        return 1

    def _prepare(self, model: Any) -> None:
        # A bias shifts all scores alike: no preference tells it, and transformers' classifiers have none.
        if model.post_process:
            model.output_layer.bias.requires_grad_(False)

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


class ChatEngine(SupervisedEngine):
    """A language model by the cross entropy of the marked tokens."""

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
        logprobs_BT = response_logprobs(output, batch.tokens_BT, batch.response_mask_BT, self._shape.vocab)
        return logprobs_BT.sum(dim=1)
