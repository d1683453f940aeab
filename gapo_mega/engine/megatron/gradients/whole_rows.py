"""Gradients of several objectives, laid out like Megatron's gradient buffers, and their reduction."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from gapo_mega.engine.megatron.gradients.shard import STAGGER, GradientShard
from gapo_mega.engine.megatron.model.buffers import bucket_groups_of, buffers_of
from gapo_mega.engine.megatron.model.optimizer import Trainable
from gapo_mega.engine.megatron.model.reduction import reduce_gradients, without_overlap


class WholeRows:
    """``count`` fp32 rows over all of this rank's parameters, also those it does not own.

    Attributes:
        pieces: of every row, the views shaped like the shard that this rank owns.
    """

    def __init__(self, trainable: Trainable, count: int) -> None:
        self._trainable = trainable
        self._buffers: list[Any] = [buffer for chunk in trainable.chunks for buffer in buffers_of(chunk)]
        self._rows = [_matrix(buffer.grad_data, count) for buffer in self._buffers]
        self._place: dict[nn.Parameter, tuple[int, int, int]] = {
            parameter: (number, start, end)
            for number, buffer in enumerate(self._buffers)
            for parameter, (start, end, _) in buffer.param_index_map.items()
        }
        self.pieces: list[list[Tensor]] = []
        for index in range(count):
            with self._standing_in(index):
                self.pieces.append(GradientShard(trainable.chunks).pieces)

    @property
    def numel(self) -> int:
        """Elements of all rows."""
        return sum(row.numel() for row in self._rows)

    @property
    def parameters(self) -> list[nn.Parameter]:
        """All of this rank's."""
        return list(self._place)

    def of(self, parameter: nn.Parameter) -> Tensor:
        """A parameter's elements in all rows, ``[count, numel]``."""
        number, start, end = self._place[parameter]
        return self._rows[number][:, start:end]

    def reduce(self) -> None:
        """Megatron's reduction of every row and of its own buffer."""
        if dist.get_world_size() == 1:
            return  # Megatron would copy every row on to itself
        chunks = self._trainable.chunks
        with without_overlap(chunks):
            for index in range(len(self.pieces)):
                with self._standing_in(index):
                    reduce_gradients(chunks)
            reduce_gradients(chunks)

    @contextmanager
    def _standing_in(self, index: int) -> Iterator[None]:
        """Within the block, Megatron finds row ``index`` wherever it looks for its gradient buffer."""
        buckets = [bucket for buffer in self._buffers for bucket in buffer.buckets]
        data = [bucket.grad_data for bucket in buckets]
        gradients = {parameter: parameter.main_grad for parameter in self._place}  # type: ignore[attr-defined]
        try:
            for buffer, rows in zip(self._buffers, self._rows, strict=True):
                for bucket in buffer.buckets:
                    bucket.grad_data = rows[index, bucket.offset : bucket.offset + bucket.grad_data.numel()]
            for parameter, (number, start, end) in self._place.items():
                view = self._rows[number][index, start:end].view(parameter.shape)
                parameter.main_grad = view  # type: ignore[attr-defined]
            self._forget_shards()
            yield
        finally:
            for bucket, own in zip(buckets, data, strict=True):
                bucket.grad_data = own
            for parameter, gradient in gradients.items():
                parameter.main_grad = gradient  # type: ignore[attr-defined]
            self._forget_shards()

    def _forget_shards(self) -> None:
        """Megatron caches the views of its buckets that ranks own."""
        for chunk in self._trainable.chunks:
            for group in bucket_groups_of(chunk):
                group.cached_grad_buffer_shard_list = [None] * len(group.buckets)


def _matrix(buffer: Tensor, count: int) -> Tensor:
    """``[count, numel]`` zeros, whose rows start at other offsets within a page, as ``zero_row``'s do."""
    numel = buffer.numel()
    page = 4096 // buffer.itemsize
    stride = -(-numel // page) * page + STAGGER // buffer.itemsize
    # Writes the zeros: a lack of memory then shows here and not in the first update.
    rows: Tensor = torch.empty(count, stride, dtype=buffer.dtype, device=buffer.device).zero_()[:, :numel]
    return rows
