"""Per-objective gradients of the output layer alone, without a backward through the layers below.

The gradient of the output layer's weight is ``cotangent' H``: the loss's gradient with respect to the logits,
times the layer's input. With tied embeddings this is the contribution of the output layer only.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from torch import Tensor, nn

from gapo_mega import ops
from gapo_mega.engine.megatron.model import context
from gapo_mega.engine.megatron.model.logprobs import before_response
from gapo_mega.engine.megatron.model.packing import in_rows
from gapo_mega.engine.megatron.runtime.groups import Groups
from gapo_mega.types import TokenBatch


class OutputLayer:
    """One fp32 row per objective over this rank's part of the vocabulary; the last stage has them."""

    def __init__(self, model: GPTModel, groups: Groups, objectives: int) -> None:
        """``model``: the last of this rank's chunks, which on the last stage has the output layer."""
        self._model = model
        self._groups = groups
        self._objectives = objectives
        self._input_SBD: Tensor | None = None
        self.rows: list[Tensor] = []
        if model.post_process:
            weight = self._weight()
            self.rows = [
                torch.zeros(weight.shape, dtype=torch.float32, device=weight.device)
                for _ in range(objectives)
            ]

    def clear(self) -> None:
        """Zero the rows for a new minibatch."""
        for row in self.rows:
            row.zero_()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Within the block, keep the output layer's input of the latest forward pass."""
        if not self._model.post_process:
            yield
            return

        def keep(module: nn.Module, inputs: tuple[Tensor, ...]) -> None:
            self._input_SBD = inputs[0].detach()

        handle = self._model.output_layer.register_forward_pre_hook(keep)
        try:
            yield
        finally:
            handle.remove()
            self._input_SBD = None

    @torch.no_grad()
    def add(self, batch: TokenBatch, cotangent_of: Callable[[int], Tensor]) -> None:
        """Accumulate the gradients of the microbatch of the latest forward pass.

        ``cotangent_of(k)`` [N, V]: gradient of objective k's loss with respect to the logits at the response
        positions. Takes one matrix product per objective, in the model's dtype as in Megatron's own backward.
        """
        input_ND = self._input_at(context.own_mask(in_rows(batch).response_mask_BT))
        for objective, row in enumerate(self.rows):
            with torch.enable_grad():
                cotangent_NV = cotangent_of(objective)
            row += cotangent_NV.to(input_ND.dtype).t() @ input_ND

    def gram(self) -> Tensor:
        """Gram matrix [M, M] float64 on the CPU, the same on every rank of a replica.

        All-reduces the rows over the ranks with this part of the weights, then the local Gram matrices over
        the replica, in which those of one context rank count.
        """
        local = torch.zeros(self._objectives, self._objectives, dtype=torch.float64)
        if self.rows:
            group = parallel_state.get_data_parallel_group(with_context_parallel=True)
            for row in self.rows:
                dist.all_reduce(row, group=group)
            if self._groups.layout.context_rank == 0:
                local = ops.gramian([row.view(-1) for row in self.rows]).cpu()
        return ops.sum_gram_(local, self._groups.replica)

    def _weight(self) -> Tensor:
        if self._model.share_embeddings_and_output_weights:
            shared: Tensor = self._model.shared_embedding_or_output_weight()
            return shared
        own: Tensor = self._model.output_layer.weight
        return own

    def _input_at(self, mask_BT: Tensor) -> Tensor:
        """The output layer's input at the response positions [N, D]."""
        assert self._input_SBD is not None, "no forward pass since listening()"
        input_SBD = self._input_SBD
        if self._model.config.sequence_parallel:
            input_SBD = gather_from_sequence_parallel_region(input_SBD, tensor_parallel_output_grad=False)
        return before_response(input_SBD.transpose(0, 1), mask_BT)


def parameters_of_layers(chunks: Sequence[GPTModel], ranges: Sequence[Sequence[int]]) -> list[nn.Parameter]:
    """This stage's trained parameters of the layers in ``ranges``, [first, end) from 0 over all stages."""
    return [
        parameter
        for chunk in chunks
        for layer in chunk.decoder.layers
        if any(first <= layer.layer_number - 1 < end for first, end in ranges)
        for parameter in layer.parameters()
        if parameter.requires_grad
    ]
