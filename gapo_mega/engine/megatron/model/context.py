"""Context parallelism: the positions of every sequence over ranks that hold the same weights.

The split is Megatron's and Transformer Engine's: a sequence of 2 C equal pieces, of which rank r of C has the
pieces r and 2 C - 1 - r, so that all have as many pairs under causal attention. Everything in a layer but
attention works on a position by itself. Log-probabilities are computed where their position is, and then
every rank of the group has all of them: it computes the whole loss, and takes from the loss's gradient what
belongs to its own positions. So the sum over the group of what the ranks leave in their gradient buffers is
the gradient, and Megatron reduces over the group together with the data ranks.

``ContextAttention`` gathers keys and values, for Megatron's own layers. Transformer Engine's attention has
its own exchange over the same split.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.packed_seq_params import PackedSeqParams
from megatron.core.tensor_parallel import gather_from_sequence_parallel_region
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.dot_product_attention import DotProductAttention
from torch import Tensor, nn

from gapo_mega.types import TokenBatch


def size() -> int:
    """Ranks that share every sequence."""
    found: int = parallel_state.get_context_parallel_world_size()
    return found


def group() -> dist.ProcessGroup:
    """Those ranks."""
    found: dist.ProcessGroup = parallel_state.get_context_parallel_group()
    return found


def multiple() -> int:
    """Sequences are padded to a multiple of it; 1 without context parallelism.

    Every piece is as long, and tensor ranks may share a rank's part.
    """
    tensor: int = parallel_state.get_tensor_model_parallel_world_size()
    return 1 if size() == 1 else 2 * size() * tensor


def padded_width(columns: int) -> int:
    """Positions of a sequence of ``columns`` tokens over all ranks."""
    return columns + -columns % multiple()


def columns_of(rank: int, ranks: int, width: int) -> Tensor:
    """int64 ``[S]``: the positions of a sequence of ``width`` that one of ``ranks`` has, ascending."""
    pieces = torch.arange(width).view(2 * ranks, -1)
    return torch.cat((pieces[rank], pieces[2 * ranks - 1 - rank]))


def own_columns(width: int) -> Tensor:
    """Those of this rank."""
    return columns_of(parallel_state.get_context_parallel_rank(), size(), width)


def gathered_columns(ranks: int, width: int) -> Tensor:
    """int64 ``[width]``: the positions in the order in which a gathering over ``ranks`` brings them."""
    return torch.cat([columns_of(rank, ranks, width) for rank in range(ranks)])


# -- what is predicted here ----------------------------------------------------------------------------
def own_mask(mask_BT: Tensor) -> Tensor:
    """bool ``[B, S + 1]``: the mask of response tokens as if this rank's positions were the sequence.

    Column 0 is False, and column s + 1 is True where position s here predicts a response token. ``mask_BT``
    itself without context parallelism.
    """
    if size() == 1:
        return mask_BT
    return nn.functional.pad(_of_next_tokens(mask_BT), (1, 0))


def own_tokens(batch: TokenBatch) -> Tensor | None:
    """int64 ``[n]``: the response tokens that this rank's positions predict, by number in the mask's order.

    None without context parallelism: all of them.
    """
    if size() == 1:
        return None
    mask_BT = batch.response_mask_BT
    number_BT = mask_BT.flatten().cumsum(dim=0).view(mask_BT.shape) - 1
    return _of_next_tokens(number_BT)[_of_next_tokens(mask_BT)]


def _of_next_tokens(values_BT: Tensor) -> Tensor:
    """``[B, S]``: what the token after each of this rank's positions has; 0 behind the last token."""
    columns = values_BT.shape[1]
    width = padded_width(columns)
    next_BW = nn.functional.pad(values_BT[:, 1:], (0, width - columns + 1))
    return next_BW.index_select(1, own_columns(width).to(values_BT.device))


def of_all_tokens(values_Xn: Tensor, tokens_n: Tensor, count: int) -> Tensor:
    """``[X, count]`` on every rank of the group, from what each has of the tokens with numbers ``tokens_n``.

    Its gradient is taken to be the same on all ranks: each takes its own part of it.
    """
    whole_XN: Tensor = _OfAllTokens.apply(values_Xn, tokens_n, count)  # type: ignore[no-untyped-call]
    return whole_XN


class _OfAllTokens(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, values_Xn: Tensor, tokens_n: Tensor, count: int) -> Tensor:
        ctx.save_for_backward(tokens_n)
        whole_XN = values_Xn.new_zeros(len(values_Xn), count).index_copy_(1, tokens_n, values_Xn)
        dist.all_reduce(whole_XN, group=group())
        return whole_XN

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        (tokens_n,) = ctx.saved_tensors
        return grads[0].index_select(1, tokens_n), None, None


def of_all_positions(output_BSX: Tensor) -> Tensor:
    """``[B, W, X]`` in the order of the sequence, from this rank's positions; its gradient as above."""
    if size() == 1:
        return output_BSX
    found_WBX = gather_from_sequence_parallel_region(
        output_BSX.transpose(0, 1).contiguous(), tensor_parallel_output_grad=False, group=group()
    )
    order_W = gathered_columns(size(), len(found_WBX)).argsort().to(found_WBX.device)
    output_BWX: Tensor = found_WBX.index_select(0, order_W).transpose(0, 1)
    return output_BWX


# -- attention -------------------------------------------------------------------------------------------
class ContextAttention(DotProductAttention):  # type: ignore[misc]
    """Megatron's attention of this rank's queries to the keys and values of the whole sequence."""

    def __init__(self, config: TransformerConfig, *args: Any, **kwargs: Any) -> None:
        """As the base, which refuses context parallelism because it sees the keys of one rank."""
        alone = copy.copy(config)
        alone.context_parallel_size = 1
        super().__init__(alone, *args, **kwargs)
        softmax = self.scale_mask_softmax
        # Masks come from here: in the base's a query's row number is its position.
        self._window, softmax.window_size = softmax.window_size, None

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
        """``[S, B, H, D]`` as the base's, S positions of this rank."""
        assert attention_mask is None, "padding stands behind every sequence"
        key, value = (
            gather_from_sequence_parallel_region(part.contiguous(), group=group()) for part in (key, value)
        )
        rank: int = parallel_state.get_context_parallel_rank()
        hidden_SW = _hidden(len(key), self._window, rank, size(), query.device)
        found: Tensor = super().forward(
            query, key, value, hidden_SW, attn_mask_type, attention_bias, packed_seq_params
        )
        return found


@functools.lru_cache(maxsize=4)  # of the microbatches under way; all layers have the same
def _hidden(
    width: int, window: tuple[int, int] | None, rank: int, ranks: int, device: torch.device
) -> Tensor:
    """bool ``[1, 1, S, W]``: which gathered keys a query of a rank does not see."""
    query_S1 = columns_of(rank, ranks, width).to(device)[:, None]
    key_W = gathered_columns(ranks, width).to(device)
    hidden_SW = key_W > query_S1
    if window is not None:
        hidden_SW |= key_W < query_S1 - window[0]
    return hidden_SW[None, None]
