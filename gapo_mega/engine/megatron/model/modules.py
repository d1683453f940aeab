"""Modules that Megatron-core lacks without Transformer Engine, and the critic's output layer."""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.models.gpt import GPTModel
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from torch import Tensor, nn


class RMSNorm(nn.Module):
    """Root-mean-square norm whose weight carries the ``sequence_parallel`` mark.

    With sequence parallelism each tensor rank sees a part of the sequence, and the mark makes
    ``finalize_model_grads`` all-reduce the weight's gradient over tensor ranks. Megatron's wrapper of the
    torch norm refuses sequence parallelism.
    """

    def __init__(self, config: TransformerConfig, hidden_size: int, eps: float = 1e-5, **_: Any) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(hidden_size, dtype=config.params_dtype))
        self.weight.sequence_parallel = config.sequence_parallel  # type: ignore[attr-defined]

    def forward(self, x: Tensor) -> Tensor:
        # Normalises in fp32 for every compute dtype, as transformers and Transformer Engine do.
        normed = nn.functional.rms_norm(x.float(), self.weight.shape, eps=self.eps)
        return self.scale(normed.to(x.dtype), self.weight)

    def scale(self, normed: Tensor, weight: nn.Parameter) -> Tensor:
        """Apply the weight; what takes its gradient from autograd replaces this method of an instance."""
        return normed * weight


class ValueHead(nn.Module):
    """``[T, B, hidden] -> [T, B, heads]`` in fp32, replicated over tensor ranks.

    Takes the place of GPTModel's ``output_layer`` and follows its call signature.
    """

    def __init__(self, config: TransformerConfig, heads: int) -> None:
        super().__init__()
        self.sequence_parallel = config.sequence_parallel
        # Zeros make the first values 0 for any features of the backbone.
        self.weight = nn.Parameter(torch.zeros(heads, config.hidden_size, dtype=config.params_dtype))
        self.bias = nn.Parameter(torch.zeros(heads, dtype=config.params_dtype))

    def forward(
        self, x: Tensor, weight: None = None, runtime_gather_output: bool | None = None
    ) -> tuple[Tensor, None]:
        if self.sequence_parallel:
            # Every tensor rank computes the whole head, so the backward takes this rank's slice.
            x = gather_from_sequence_parallel_region(x, tensor_parallel_output_grad=False)
        return nn.functional.linear(x.float(), self.weight.float(), self.bias.float()), None


class ValueModel(GPTModel):  # type: ignore[misc]
    """A GPTModel whose last pipeline stage ends in a value head: ``[B, T, heads]``."""

    def __init__(self, *, heads: int, config: TransformerConfig, **kwargs: Any) -> None:
        super().__init__(config=config, share_embeddings_and_output_weights=False, **kwargs)
        if self.post_process:
            self.output_layer = ValueHead(config, heads)
