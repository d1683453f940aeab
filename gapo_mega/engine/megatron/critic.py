"""Value models: one GPTModel with a head per objective, or one model per objective."""

from __future__ import annotations

import logging
import math

import torch
from torch import Tensor

from gapo_mega.engine.base import ValueLoss
from gapo_mega.engine.megatron.model.forward import forward_backward, forward_only, split, split_evenly
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.types import Experience, TokenBatch

logger = logging.getLogger(__name__)


def _before_token(output_BTH: Tensor) -> Tensor:
    """``[B, T, H] -> [H, B, T]``: column t is the value of the state in which token t is sampled.

    The model's output at position t - 1 has seen the tokens before t; column 0 has no state and is 0.
    """
    shifted_BTH = torch.nn.functional.pad(output_BTH[:, :-1], (0, 0, 1, 0))
    return shifted_BTH.permute(2, 0, 1)


class Critics:
    """All value models of a run; objective ``i`` is head ``i`` of the concatenated heads."""

    def __init__(
        self,
        models: list[Trainable],
        heads: int,
        groups: Groups,
        micro_batch: int,
        micro_batch_tokens: int | None = None,
    ) -> None:
        """``micro_batch``, ``micro_batch_tokens``: ``size`` and ``tokens`` of ``split``."""
        self.models = models
        self._heads = heads  # per model
        self._groups = groups
        self._micro_batch = micro_batch
        self._micro_batch_tokens = micro_batch_tokens

    def values(self, batch: TokenBatch) -> Tensor:
        """``[M, B, T]`` float32 on the CPU, no graph, the same on every rank of the replica.

        0 behind the end of a microbatch's longest response.
        """
        outputs: list[Tensor] = []
        for trainable in self.models:
            pieces = split(trainable.chunks, batch, self._micro_batch, tokens=self._micro_batch_tokens)
            parts = forward_only(trainable.chunks, pieces.parts, lambda out, _: _before_token(out).cpu())
            shape = (self._heads, *batch.tokens_BT.shape)
            local = pieces.rejoin(parts, dim=1) if parts else torch.zeros(shape)
            outputs.append(self._groups.from_last_stage(local.float()))
        return torch.cat(outputs)

    @staticmethod
    def _step(trainable: Trainable) -> None:
        """One optimizer step, skipped if the gradient is not finite: parameters would stay NaN."""
        if not math.isfinite(trainable.grad_norm()):
            trainable.zero_grad()
            logger.warning("critic update skipped: its gradient is not finite")
            return
        trainable.step()

    def update(self, minibatch: Experience, loss: ValueLoss) -> list[float]:
        """One optimizer step of every model. Returns the value loss per model, the global token mean."""
        tokens = float(self._groups.sum_over_data(minibatch.response_mask_BT.sum()))
        losses: list[float] = []
        for index, trainable in enumerate(self.models):
            first = index * self._heads

            def mean_loss(output_BTH: Tensor, batch: Experience, first: int = first) -> tuple[Tensor, Tensor]:
                values_HBT = _before_token(output_BTH)
                parts = [loss(values_BT, batch, first + head) for head, values_BT in enumerate(values_HBT)]
                mean = torch.stack(parts).sum() / tokens
                return mean, mean

            trainable.zero_grad()
            size, row = self._micro_batch, self._micro_batch_tokens
            microbatches = split_evenly(self._groups, trainable.chunks, minibatch, size, row).parts
            part = forward_backward(trainable.chunks, microbatches, mean_loss)
            self._step(trainable)
            losses.append(float(self._groups.sum_over_data(self._groups.from_last_stage(part))))
        return losses
