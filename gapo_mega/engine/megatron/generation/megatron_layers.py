"""A chunk of the model for generation, computed by Megatron's own layers: for those that ours do not know."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from megatron.core.fusions.fused_softmax import FusedScaleMaskSoftmax
from megatron.core.inference.contexts import StaticInferenceContext
from megatron.core.models.gpt import GPTModel
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from gapo_mega.engine.megatron.runtime.cpu import megatron_device

# Megatron's switches for sequence parallelism on the modules that communicate.
_SEQUENCE_SWITCHES = ("sequence_parallel", "reduce_scatter_embeddings")


def takes_padding(model: GPTModel) -> bool:
    """Only Megatron's own attention takes a padding mask on top of the causal one in prefill and decode."""
    return any(isinstance(module, DotProductAttention) for module in model.modules())


class MegatronLayers:
    """A ``Chunk``; run it within ``inference_state``."""

    def __init__(self, model: GPTModel) -> None:
        self.takes_tokens, self.gives_logits = bool(model.pre_process), bool(model.post_process)
        self._model = model

    def prefill(
        self, inputs: Tensor, padding_U: Tensor, inverse_B: Tensor, columns: int
    ) -> tuple[Tensor, MegatronRows]:
        rows = MegatronRows(self._model, padding_U, columns)
        seen = inputs.shape[1] if self.takes_tokens else inputs.shape[0]
        output = rows.forward(inputs, torch.arange(seen, device=padding_U.device))
        rows.keep(inverse_B)
        rows.context.enable_decode_mode()
        return output, rows


class MegatronRows:
    """The ``Rows`` of Megatron's layers: its inference context, and the rows' padding."""

    def __init__(self, model: GPTModel, padding_B: Tensor, columns: int) -> None:
        self.context = StaticInferenceContext(len(padding_B), columns)
        self._model = model
        self._may_pad = takes_padding(model)
        self._padding_B = padding_B

    def keep(self, index_B: Tensor) -> None:
        self._padding_B = self._padding_B[index_B]
        # Megatron's own swap_key_value_dict permutes rows but cannot change their number.
        kept = self.context.key_value_memory_dict
        for layer, (keys, values) in kept.items():
            kept[layer] = (keys[:, index_B], values[:, index_B])

    def decode(self, inputs: Tensor) -> Tensor:
        column = self.context.sequence_len_offset
        return self.forward(inputs, torch.tensor([column], device=self._padding_B.device))

    def forward(self, inputs: Tensor, columns_S: Tensor) -> Tensor:
        """The chunk's output for these columns of the padded batch, which follow those before."""
        model, padding_B = self._model, self._padding_B
        positions_BS = (columns_S - padding_B[:, None]).clamp(min=0)
        if not model.pre_process:
            model.set_input_tensor(inputs)
        with megatron_device():
            output: Tensor = model(
                # A later chunk does not read tokens.
                input_ids=inputs if model.pre_process else positions_BS,
                position_ids=positions_BS,
                attention_mask=_attention_mask(columns_S, padding_B) if self._may_pad else None,
                inference_context=self.context,
                runtime_gather_output=True,
            )
        self.context.increment_sequence_len_offset(len(columns_S))
        if not model.pre_process:
            model.set_input_tensor(None)
        return output[:, -1].float() if model.post_process else output


def _attention_mask(columns_S: Tensor, padding_B: Tensor) -> Tensor | None:
    """bool ``[B, 1, S, K]``, True where a query (column of ``columns_S``) must not see a key.

    ``None`` if no row is padded: Megatron's default is causal attention.
    """
    if not bool(padding_B.any()):
        return None
    key_K = torch.arange(int(columns_S[-1]) + 1, device=columns_S.device)
    future_SK = key_K > columns_S[:, None]
    return (future_SK | (key_K < padding_B[:, None, None]))[:, None]


@contextmanager
def inference_state(chunks: Sequence[GPTModel]) -> Iterator[None]:
    """Evaluation mode without sequence parallelism and without sliding window, all restored on exit.

    Sequence parallelism cannot split a single new token. Megatron's sliding window would replace the mask
    that hides the padding, and ``generate`` accepts only sequences within the window.
    """
    training = [chunk.training for chunk in chunks]
    config = chunks[0].config  # shared by all
    sequence_parallel = config.sequence_parallel
    saved: list[tuple[nn.Module, str, Any]] = []
    for module in (module for chunk in chunks for module in chunk.modules()):
        names = [name for name in _SEQUENCE_SWITCHES if name in vars(module)]
        if isinstance(module, FusedScaleMaskSoftmax):
            names.append("window_size")
        saved.extend((module, name, vars(module)[name]) for name in names)
    try:
        for chunk in chunks:
            chunk.eval()
        config.sequence_parallel = False
        for module, name, _ in saved:
            setattr(module, name, None if name == "window_size" else False)
        yield
    finally:
        for module, name, value in saved:
            setattr(module, name, value)
        config.sequence_parallel = sequence_parallel
        for chunk, was_training in zip(chunks, training, strict=True):
            chunk.train(was_training)
