"""The output layer where a response token is predicted, and nowhere else.

With much vocabulary the output layer is a good part of a model, and nobody reads its outputs at prompts and
padding. Hooks around one forward hand it a rectangle of hidden states, as long as the longest response of the
microbatch, and then pick the N outputs that are wanted. So every module still sees [sequence, batch,
features].
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.tensor_parallel import (
    gather_from_sequence_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn


@dataclass(frozen=True)
class Rectangle:
    """R positions of every sequence, among them those that predict its response tokens."""

    positions_RB: Tensor | None  # int64; None: all positions of the sequence in their order
    # int64: the places of the N outputs in [R * B], in the order of the mask. None: all of [B, R].
    places_N: Tensor | None

    @classmethod
    def around(cls, mask_BT: Tensor, width: int, multiple: int) -> Rectangle:
        """The smallest one for response tokens at ``mask_BT``, whose column 0 is False.

        Args:
            width: positions of the sequences in the model, T and perhaps padding.
            multiple: R is a multiple of it, because sequence parallelism splits the rectangle.
        """
        predicts_BT = mask_BT[:, 1:]
        rows = len(mask_BT)
        counts_B = predicts_BT.sum(dim=1)
        longest = max(1, int(counts_B.max()))
        longest += -longest % multiple
        if longest >= width:
            row_N, position_N = predicts_BT.nonzero(as_tuple=True)
            return cls(None, position_N * rows + row_N)
        # Stable: the wanted positions in their order, then others, which exist but nobody reads.
        first_BT = (~predicts_BT).to(torch.uint8).argsort(dim=1, stable=True)
        positions_BR = nn.functional.pad(first_BT, (0, longest - first_BT.shape[1]))
        wanted_BR = torch.arange(longest, device=mask_BT.device) < counts_B[:, None]
        row_N, step_N = wanted_BR.nonzero(as_tuple=True)
        every = len(row_N) == wanted_BR.numel()
        return cls(positions_BR.t().contiguous(), None if every else step_N * rows + row_N)

    def to(self, device: torch.device) -> Rectangle:
        """The same on ``device``."""
        return Rectangle(*(None if index is None else index.to(device) for index in self._indices()))

    def narrow(self, hidden_SBD: Tensor) -> Tensor:
        """``[R, B, D]``: the hidden states at the positions."""
        if self.positions_RB is None:
            return hidden_SBD
        sequences, width = hidden_SBD.shape[1:]
        index_RB = self.positions_RB * sequences + torch.arange(sequences, device=hidden_SBD.device)
        rows = hidden_SBD.reshape(-1, width).index_select(0, index_RB.view(-1))
        return rows.view(-1, sequences, width)

    def pick(self, output_RBX: Tensor) -> Tensor:
        """``[N, X]``: the wanted outputs in the order of the mask, by at most one copy."""
        if self.places_N is None and output_RBX.shape[1] == 1:
            return output_RBX.flatten(0, 1)
        chosen_NX: Tensor = _Picked.apply(output_RBX, self.places_N)  # type: ignore[no-untyped-call]
        return chosen_NX

    def every_place(self, rows: int, sequences: int) -> Tensor:
        """The places of the N outputs in ``[R * B]``, int64, also where they are all of them."""
        if self.places_N is not None:
            return self.places_N
        assert self.positions_RB is not None
        every_RB = torch.arange(rows * sequences, device=self.positions_RB.device).view(rows, sequences)
        return every_RB.t().flatten()

    def _indices(self) -> tuple[Tensor | None, Tensor | None]:
        return self.positions_RB, self.places_N


def picked(output_RBX: Tensor, places_N: Tensor) -> Tensor:
    """``[N, X]``: the outputs at ``places_N`` of ``[R * B]``, with a contiguous gradient."""
    chosen_NX: Tensor = _Picked.apply(output_RBX, places_N)  # type: ignore[no-untyped-call]
    return chosen_NX


class _Picked(torch.autograd.Function):
    """``pick`` with a gradient that is contiguous: every matrix product would make its own copy else."""

    @staticmethod
    def forward(ctx: Any, output_RBX: Tensor, places_N: Tensor | None) -> Tensor:
        ctx.places_N, ctx.shape = places_N, output_RBX.shape
        if places_N is None:
            return output_RBX.transpose(0, 1).flatten(0, 1)
        return output_RBX.flatten(0, 1).index_select(0, places_N)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        rows, sequences, width = ctx.shape
        if ctx.places_N is None:
            return grads[0].view(sequences, rows, width).transpose(0, 1).contiguous(), None
        grad = grads[0].new_zeros(rows * sequences, width)
        return grad.index_copy_(0, ctx.places_N, grads[0]).view(ctx.shape), None


@contextmanager
def output_only_at(model: nn.Module, rectangle: Rectangle) -> Iterator[None]:
    """Within the block, a forward of a last stage returns ``[1, N, X]`` in place of ``[B, S, X]``.

    Other stages are left alone. Hooks that were there before see the whole input of the output layer.
    """
    if not get_attr_wrapped_model(model, "post_process"):
        yield
        return
    layer: nn.Module = get_attr_wrapped_model(model, "output_layer")
    split = bool(get_attr_wrapped_model(model, "config").sequence_parallel)

    def pick(
        _: nn.Module, inputs: tuple[Tensor, ...], output: tuple[Tensor, Tensor | None]
    ) -> tuple[Tensor, Tensor | None]:
        outputs_RBX, bias = output
        # As N sequences of one token: Megatron's change to [batch, sequence] then copies nothing.
        return rectangle.pick(outputs_RBX).unsqueeze(1), bias

    with narrowed(layer, rectangle, split):
        handle = layer.register_forward_hook(pick)
        try:
            yield
        finally:
            handle.remove()


@contextmanager
def narrowed(layer: nn.Module, rectangle: Rectangle, split: bool) -> Iterator[None]:
    """Within the block, an output layer gets the rectangle of its inputs; ``split``: over the sequence."""

    def narrow(_: nn.Module, inputs: tuple[Tensor, ...]) -> tuple[Tensor, ...] | None:
        if rectangle.positions_RB is None:
            return None
        (hidden_SBD,) = inputs
        if not split:
            return (rectangle.narrow(hidden_SBD),)
        # Every tensor rank has the whole rectangle's gradient behind the layer, so a rank takes its own part.
        hidden_SBD = gather_from_sequence_parallel_region(hidden_SBD, tensor_parallel_output_grad=False)
        return (scatter_to_sequence_parallel_region(rectangle.narrow(hidden_SBD)),)

    handle = layer.register_forward_pre_hook(narrow)
    try:
        yield
    finally:
        handle.remove()
