"""Several sequences of a microbatch in one row, without attention between them.

The row has no padding but what its width asks for, and positions begin anew with every sequence. Megatron's
``PackedSeqParams`` in the ``thd`` format tell the layers where sequences begin: rotary embeddings read them,
and so does Transformer Engine's attention. Megatron's own attention does not: ``PackedAttention`` runs it on
one sequence after the other, which also saves the scores between sequences.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from gapo_mega.types import TokenBatch


class PackedAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's attention, which also takes packed rows."""

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        attn_mask_type: Any = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: PackedSeqParams | None = None,
    ) -> Tensor:
        """``[S, B, H, D]`` as Megatron's; packed ``[S, H, D]``, and ``[S, H * D]`` of what it returns."""
        attend: Callable[..., Tensor] = super().forward
        if packed_seq_params is None:
            return attend(query, key, value, attention_mask, attn_mask_type, attention_bias)
        ends = packed_seq_params.cu_seqlens_q
        lengths = (ends[1:] - ends[:-1]).tolist()
        parts = zip(*(torch.split(x.unsqueeze(1), lengths) for x in (query, key, value)), strict=True)
        found = [attend(*part, attention_mask, attn_mask_type, attention_bias) for part in parts]
        return torch.cat(found).squeeze(1)


def in_rows(batch: TokenBatch) -> TokenBatch:
    """Tokens and mask as a model gets them: of a packed batch ``[1, S]``, with zeros behind the last one.

    Response tokens are in the order of ``batch``'s own mask, and each one's predecessor is before it.
    """
    if batch.packed_width is None:
        return batch
    inside_BT = _inside(batch)
    tokens_S, mask_S = batch.tokens_BT[inside_BT], batch.response_mask_BT[inside_BT]
    padding = (0, batch.packed_width - len(tokens_S))
    return TokenBatch(nn.functional.pad(tokens_S, padding)[None], nn.functional.pad(mask_S, padding)[None])


def run_packed(
    model: nn.Module, batch: TokenBatch, device: torch.device, tells_routers: bool = False
) -> Tensor:
    """The stage's output ``[1, S, X]`` for a packed batch, which may lie on the host.

    ``tells_routers``: the routers of experts learn which tokens are no padding.
    """
    tokens_1S = in_rows(batch).tokens_BT
    told = {}
    if tells_routers:
        own = int(batch.lengths_B.sum())
        told["padding_mask"] = torch.arange(tokens_1S.shape[1], device=device)[None] < own
    lengths = sequence_lengths(batch)
    positions_1S = torch.cat([torch.arange(length) for length in lengths])[None]
    ends = torch.tensor([0, *lengths], dtype=torch.int32).cumsum(dim=0, dtype=torch.int32).to(device)
    longest = max(lengths)
    output: Tensor = model(
        input_ids=tokens_1S.to(device),
        position_ids=positions_1S.to(device),
        attention_mask=None,
        packed_seq_params=PackedSeqParams(
            qkv_format="thd",
            cu_seqlens_q=ends,
            cu_seqlens_kv=ends,
            max_seqlen_q=longest,
            max_seqlen_kv=longest,
        ),
        **told,
    )
    return output


def sequence_lengths(batch: TokenBatch) -> list[int]:
    """Of the sequences in a packed batch's row; padding behind them is one more sequence."""
    assert batch.packed_width is not None
    lengths: list[int] = batch.lengths_B.tolist()
    padding = batch.packed_width - sum(lengths)
    assert padding >= 0, (lengths, batch.packed_width)
    return [*lengths, padding] if padding else lengths


def sequence_numbers(batch: TokenBatch) -> Tensor:
    """int64 ``[S]``: the sequence of a packed batch that each position is of; padding is the last one's.

    On the host, as the batch.
    """
    lengths = sequence_lengths(batch)
    numbers_S = torch.arange(len(lengths)).repeat_interleave(torch.tensor(lengths))
    return numbers_S.clamp_(max=batch.batch_size - 1)


def unpacked(output_1SX: Tensor, batch: TokenBatch) -> Tensor:
    """``[B, T, X]``: a packed batch's outputs where its tokens are, 0 behind them; on one device."""
    inside_BT = _inside(batch)
    lengths_B = batch.lengths_B
    place_BT = (lengths_B.cumsum(dim=0) - lengths_B)[:, None] + torch.arange(
        inside_BT.shape[1], device=inside_BT.device
    )
    found_BTX = output_1SX[0].index_select(0, torch.where(inside_BT, place_BT, 0).flatten())
    return torch.where(inside_BT[..., None], found_BTX.view(*inside_BT.shape, -1), 0.0)


def _inside(batch: TokenBatch) -> Tensor:
    columns_T = torch.arange(batch.tokens_BT.shape[1], device=batch.tokens_BT.device)
    return columns_T < batch.lengths_B[:, None]
