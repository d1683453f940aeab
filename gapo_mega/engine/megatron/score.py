"""Score models, sharded like the policy: they map the token ids of a conversation to one number."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from gapo_mega.config import ModelConfig, ParallelConfig
from gapo_mega.engine.megatron.checkpoint import weights
from gapo_mega.engine.megatron.checkpoint.dist_format import DistReader, is_checkpoint
from gapo_mega.engine.megatron.checkpoint.weights import head_if_any
from gapo_mega.engine.megatron.model.build import build_gpt
from gapo_mega.engine.megatron.model.forward import forward_only
from gapo_mega.engine.megatron.model.frozen import FrozenModel
from gapo_mega.engine.megatron.runtime.cpu import megatron_device
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.models import HFDirectory, shape_of
from gapo_mega.models.huggingface import location as model_location
from gapo_mega.models.huggingface.config import read_config
from gapo_mega.models.score_head import KEPT
from gapo_mega.objectives.base import ScoreModelRequest
from gapo_mega.types import TokenBatch


def last_positions(tokens: Sequence[Sequence[int]], skip: int | None) -> list[int]:
    """The position of each row's score: its last token, or its last that is not ``skip`` (0 if all are)."""
    if skip is None:
        return [len(row) - 1 for row in tokens]
    return [max((i for i, token in enumerate(row) if token != skip), default=0) for row in tokens]


class ScoreModel:
    """One frozen score model. Collective over the ranks of a replica; every rank gets all scores.

    Args:
        source: Hugging Face directory or Megatron checkpoint of a score model.
        settings: give its compute type.
        parallel: the policy's layout, which it shares.
        micro_batch: sequences per microbatch.
        offload: keep the weights in host memory between uses.
    """

    def __init__(
        self,
        source: Path,
        settings: ModelConfig,
        parallel: ParallelConfig,
        groups: Groups,
        micro_batch: int,
        offload: bool,
    ) -> None:
        self._groups = groups
        self._micro_batch = micro_batch
        head = head_if_any(source)
        if head is None:
            raise ValueError(
                f"{source}: found a language model, accepted: a score model with one score a text"
            )
        self._head = head
        shape = shape_of(read_config(model_location.companions_of(source)))
        model = build_gpt(shape, settings, parallel, value_heads=1)
        weights.load(model, shape, source, self._head)
        self._model = FrozenModel(model, offload)
        self._mean, self._deviation = self._statistics(source)

    @classmethod
    def requested(
        cls, request: ScoreModelRequest, policy: ModelConfig, parallel: ParallelConfig, groups: Groups
    ) -> ScoreModel:
        """The model that ``request`` names; its other settings are those of the policy."""
        settings = policy.model_copy(update={"path": request.path, "dtype": request.dtype})
        source = model_location.resolve(request.path)
        return cls(source, settings, parallel, groups, request.micro_batch_size, request.offload)

    def __call__(self, tokens: Sequence[Sequence[int]]) -> list[float]:
        """Scores of token-id sequences (at least one token each), in their order; higher is better."""
        if not tokens:
            return []
        # Sequences of similar length share a microbatch, because padding costs compute, too.
        order = sorted(range(len(tokens)), key=lambda i: len(tokens[i]))
        parts: list[Tensor] = []
        with megatron_device(), self._model.on_device() as model:
            for start in range(0, len(order), self._micro_batch):
                batch = self._batch([tokens[i] for i in order[start : start + self._micro_batch]])
                parts += forward_only([model], [batch], _at_marks)
        raw_B = torch.cat(parts) if parts else torch.zeros(len(tokens))
        raw_B = self._groups.from_last_stage(raw_B)
        scores = self._finish(raw_B).tolist()
        by_index = dict(zip(order, scores, strict=True))
        return [by_index[i] for i in range(len(tokens))]

    def _batch(self, rows: Sequence[Sequence[int]]) -> TokenBatch:
        width = max(map(len, rows))
        tokens_BT = torch.zeros(len(rows), width, dtype=torch.int64)
        mark_BT = torch.zeros(len(rows), width, dtype=torch.bool)
        positions = last_positions(rows, self._head.skip_padding_id)
        for i, (row, position) in enumerate(zip(rows, positions, strict=True)):
            tokens_BT[i, : len(row)] = torch.tensor(row)
            mark_BT[i, position] = True
        return TokenBatch(tokens_BT, mark_BT)

    def _finish(self, raw_B: Tensor) -> Tensor:
        """Normalise as the model's head asks for; flip the sign of a cost, so that higher is better."""
        if self._head.normalize == "affine":
            raw_B = raw_B - self._mean
        if self._head.normalize is not None:
            raw_B = raw_B / self._deviation
        return -raw_B if self._head.is_cost else raw_B

    def _statistics(self, source: Path) -> tuple[Tensor, Tensor]:
        """Mean and standard deviation of the stored normaliser; 0 and 1 without one."""
        if self._head.normalize is None:
            return torch.zeros(()), torch.ones(())
        values: list[Tensor] = []
        for name in ("normalizer.mean", "normalizer.var"):
            if name not in self._head.statistics:
                raise ValueError(f"{source}: config.json do_normalize: found true, but there is no {name}")
            stored = is_checkpoint(source)
            value = DistReader(source).read(KEPT + name) if stored else HFDirectory(source).read(name)
            values.append(value.float().reshape(()))
        return values[0], values[1].sqrt()


def _at_marks(output_BT1: Tensor, batch: TokenBatch) -> Tensor:
    """``[B]`` float32 on the CPU: the output at each row's one marked position."""
    return output_BT1[..., 0][batch.response_mask_BT].float().cpu()
