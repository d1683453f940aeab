"""A chunk of the model for generation alone: our own decoder over the training weights.

It computes what Megatron's layers compute of the model families that we have, with fewer and larger kernels:
rotated keys are kept, queries are grouped and not keys repeated, the products are those of ``products.py``.
Nothing in it knows a device. ``layers.py`` says which models it can take.

Shapes: S columns, N rows of the batch (prompts, or sequences), D hidden, G groups, R queries of a group, C
channels of a head.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.models.gpt import GPTModel
from torch import Tensor

from gapo_mega.engine.megatron.generation.attention import KeyValueCache, visible_columns
from gapo_mega.engine.megatron.generation.layers import Embedding, Layer, layers_of, output_of


class Decoder:
    """A ``Chunk`` with the weights that ``model`` has now; make another one when they have changed.

    ``model`` must be one that ``layers.obstacle`` finds nothing against.
    """

    def __init__(self, model: GPTModel) -> None:
        self.takes_tokens, self.gives_logits = bool(model.pre_process), bool(model.post_process)
        self._split = model.config.tensor_model_parallel_size > 1
        self._embedding = Embedding.of(model) if self.takes_tokens else None
        self._layers = layers_of(model)
        self._output = output_of(model) if self.gives_logits else None
        self._scale = float(model.decoder.layers[0].self_attention.core_attention.softmax_scale)
        self._frequencies = model.rotary_pos_emb.inv_freq
        self._dtype: torch.dtype = model.config.params_dtype

    def prefill(
        self, inputs: Tensor, padding_U: Tensor, inverse_B: Tensor, columns: int
    ) -> tuple[Tensor, DecodedRows]:
        x_SND = self._begin(inputs)
        seen, prompts = x_SND.shape[:2]
        cache = KeyValueCache(padding_U[inverse_B], columns, self._scale, self._dtype)
        visible = visible_columns(padding_U, seen)
        turn = self._turn(0, seen, x_SND.device)
        x_ND = x_SND.flatten(0, 1)
        for layer in self._layers:
            heads, values = self._heads(layer, x_ND, turn, prompts)
            mixed_SND = cache.read_prompts(heads, values, visible, inverse_B)
            x_ND = self._finish(layer, mixed_SND.flatten(0, 1), x_ND)
        return self._end(x_ND.view(x_SND.shape)), DecodedRows(self, cache)

    def decode(self, inputs: Tensor, cache: KeyValueCache) -> Tensor:
        """``Rows.decode`` of the rows that ``cache`` belongs to."""
        x_SND = self._begin(inputs)
        x_ND = x_SND[0]
        turn = self._turn(cache.filled, 1, x_ND.device)
        cache.next_column()
        for number, layer in enumerate(self._layers):
            heads, values = self._heads(layer, x_ND, turn, len(x_ND))
            x_ND = self._finish(layer, cache.read_column(number, heads[0], values[0]), x_ND)
        return self._end(x_ND[None])

    # -- into and out of the layers ------------------------------------------------------------------
    def _begin(self, inputs: Tensor) -> Tensor:
        if self._embedding is None:
            return inputs
        x_SND = self._embedding(inputs.t())
        return self._summed(x_SND)

    def _end(self, x_SND: Tensor) -> Tensor:
        if self._output is None:
            return x_SND
        logits_NV = self._output(x_SND[-1])
        if self._split:
            group = parallel_state.get_tensor_model_parallel_group()
            parts = [torch.empty_like(logits_NV) for _ in range(group.size())]
            dist.all_gather(parts, logits_NV, group=group)
            logits_NV = torch.cat(parts, dim=-1)
        return logits_NV.float()

    def _summed(self, x: Tensor) -> Tensor:
        """Over the tensor ranks, in place."""
        if self._split:
            dist.all_reduce(x, group=parallel_state.get_tensor_model_parallel_group())
        return x

    # -- a layer -------------------------------------------------------------------------------------
    def _turn(self, first: int, count: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Cosines ``[S, 1, 1, 1, C]`` and sines ``[S, 1, 1, 1, C / 2]`` of columns from ``first`` on."""
        column_S = torch.arange(first, first + count, dtype=torch.float32, device=device)
        angles_SC = column_S[:, None] * self._frequencies.to(device)
        cosines, sines = angles_SC.cos().to(self._dtype), angles_SC.sin().to(self._dtype)
        return cosines.repeat(1, 2)[:, None, None, None], sines[:, None, None, None]

    def _heads(
        self, layer: Layer, x_ND: Tensor, turn: tuple[Tensor, Tensor], rows: int
    ) -> tuple[Tensor, Tensor]:
        """Rotated queries and key of every group, ``[S, N, G, R + 1, C]``, and values ``[S, N, G, C]``."""
        # Megatron's order: a group's queries, its key, its value.
        qkv = layer.qkv(layer.input_norm(x_ND)).view(-1, rows, *layer.head_shape)
        heads, values = qkv[:, :, :, :-1], qkv[:, :, :, -1]
        if layer.head_norm is not None:
            heads = layer.head_norm(heads)
        return _rotated(heads, *turn), values

    def _finish(self, layer: Layer, mixed_ND: Tensor, x_ND: Tensor) -> Tensor:
        """What follows attention: its projection and the MLP, each added to what came in."""
        if not self._split:
            x_ND = layer.projection.plus(mixed_ND, x_ND)
            return layer.down.plus(layer.gated(layer.mlp_norm(x_ND)), x_ND)
        x_ND = self._summed(layer.projection(mixed_ND)) + x_ND
        return self._summed(layer.down(layer.gated(layer.mlp_norm(x_ND)))) + x_ND


@dataclass
class DecodedRows:
    """The ``Rows`` of a decoder."""

    decoder: Decoder
    cache: KeyValueCache

    def decode(self, inputs: Tensor) -> Tensor:
        return self.decoder.decode(inputs, self.cache)

    def keep(self, index_B: Tensor) -> None:
        self.cache.keep(index_B)


def _rotated(heads: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    """``heads`` ``[..., C]``: channels c and c + C / 2 are a pair, turned by the angle of c."""
    half = heads.shape[-1] // 2
    turned = heads * cosines
    turned[..., :half].addcmul_(heads[..., half:], sines, value=-1)
    turned[..., half:].addcmul_(heads[..., :half], sines)
    return turned
