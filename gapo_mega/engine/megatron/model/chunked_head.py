"""Log-probabilities of response tokens from hidden states, with the logits of some positions at a time.

Behind the last layer the logits of all response tokens are the largest tensors of a training pass. Here the
model stops before its output layer, which then runs on one chunk of positions after the other. A chunk leaves
numbers of its tokens and nothing else: the backward computes its logits once more (torch's checkpoint without
reentrance, so that a parameter's gradient is ready once). The output layer is Megatron's own, called as the
model would call it, with tensor and sequence parallelism, and with whatever has taken its gradients out of
autograd.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from megatron.core.utils import get_attr_wrapped_model
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from gapo_mega.engine.megatron.model import context
from gapo_mega.engine.megatron.model.logprobs import Wanted, chosen_logprobs, policy_at_responses
from gapo_mega.engine.megatron.model.response_positions import Rectangle, narrowed, picked
from gapo_mega.types import TokenBatch


@dataclass(frozen=True)
class _Chunk:
    """Some rows of the output layer's input, and which outputs of them are wanted."""

    hidden_rBD: Tensor  # of this tensor rank
    numbers_r: Tensor | None  # over all tensor ranks, as ``Head.numbers_R``
    places_n: Tensor  # in [r * B] of all tensor ranks
    tokens_n: Tensor  # response tokens, by their number in the mask's order


@dataclass
class Head:
    """The output layer of one forward, which has not run yet.

    Attributes:
        layer: of the last stage.
        rectangle: the positions that its inputs will have.
        numbers_R: of a packed batch, as ``Wanted.on_rows`` gets them.
        weight: the embedding's, where the layer shares it.
    """

    layer: nn.Module
    rectangle: Rectangle
    numbers_R: Tensor | None
    weight: Tensor | None = None

    def policy(self, hidden_BRD: Tensor, batch: TokenBatch, wanted: Wanted) -> Tensor:
        """``policy_at_responses`` of ``batch``, on its device, from the model's output in ``left_out``."""
        hidden_RBD = hidden_BRD.transpose(0, 1)
        rows, sequences = hidden_RBD.shape[:2]
        ranks = _ranks_along_sequence(self.layer)
        step = max(1, wanted.chunk // (sequences * ranks))
        places_N = self.rectangle.every_place(ranks * rows, sequences)
        # A rank's part of the sequence begins at position rank * rows; a chunk has some rows of every part.
        position_N, sequence_N = places_N // sequences, places_N % sequences
        rank_N, row_N = position_N // rows, position_N % rows
        own_N = context.own_tokens(batch)
        values, order = [], []
        for start in range(0, rows, step):
            length = min(step, rows - start)
            inside_N = (row_N >= start) & (row_N < start + length)
            tokens_n = inside_N.nonzero().squeeze(-1)
            # Some chunk has to run where there is no response token: the passes need a graph.
            if len(tokens_n) == 0 and not (start == 0 and len(places_N) == 0):
                continue
            local_n = rank_N[tokens_n] * length + row_N[tokens_n] - start
            places_n = local_n * sequences + sequence_N[tokens_n]
            numbers_r = self._numbers(ranks, start, length)
            of_all_n = tokens_n if own_N is None else own_N[tokens_n]
            chunk = _Chunk(hidden_RBD[start : start + length], numbers_r, places_n, of_all_n)
            values.append(self._chunk(chunk, batch, wanted))
            order.append(tokens_n)
        inverse_N = torch.cat(order).argsort()
        return policy_at_responses(torch.cat(values, dim=1)[:, inverse_N], batch, wanted.entropy, own_N)

    def _chunk(self, chunk: _Chunk, batch: TokenBatch, wanted: Wanted) -> Tensor:
        """Log-probabilities and entropies ``[2, n]`` of the response tokens of a chunk."""

        def compute(hidden_rBD: Tensor) -> Tensor:
            if wanted.on_rows is not None and chunk.numbers_r is not None:
                wanted.on_rows(chunk.numbers_r)
            outputs_rBV, _ = self.layer(hidden_rBD, weight=self.weight)
            return chosen_logprobs(picked(outputs_rBV, chunk.places_n), batch, wanted, chunk.tokens_n)

        if not torch.is_grad_enabled():
            return compute(chunk.hidden_rBD)
        computed: Tensor = checkpoint(
            compute, chunk.hidden_rBD, use_reentrant=False, preserve_rng_state=False
        )
        return computed

    def _numbers(self, ranks: int, start: int, length: int) -> Tensor | None:
        """Those of the rows from ``start`` on of every rank's part, as the output layer gathers them."""
        if self.numbers_R is None:
            return None
        return self.numbers_R.view(ranks, -1)[:, start : start + length].flatten()


def _ranks_along_sequence(layer: Any) -> int:
    """Tensor ranks that each hold a part of the sequence; 1 without sequence parallelism."""
    return int(layer.config.tensor_model_parallel_size) if layer.sequence_parallel else 1


@contextmanager
def left_out(model: nn.Module, rectangle: Rectangle, numbers_R: Tensor | None = None) -> Iterator[Head]:
    """Within the block, a forward of a last stage returns its output layer's inputs ``[B, R, D]``.

    With sequence parallelism these are this rank's part of R. ``numbers_R``: as in ``Head``.
    """
    layer: Any = get_attr_wrapped_model(model, "output_layer")
    head = Head(layer, rectangle, numbers_R)

    def forward(
        hidden_RBD: Tensor, weight: Tensor | None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        head.weight = weight
        return hidden_RBD, None

    with narrowed(layer, rectangle, bool(layer.sequence_parallel)):
        layer.forward = forward  # of the instance, before its class's
        try:
            yield head
        finally:
            del layer.forward
