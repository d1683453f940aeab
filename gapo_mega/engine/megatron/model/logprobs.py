"""Log-probabilities of given tokens from vocabulary-parallel logits.

Megatron's ``vocab_parallel_cross_entropy`` overwrites the logits and allows one backward only. The function
here keeps them, leaves out the vocabulary's padding, and computes only the positions that predict a response
token.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor


class _VocabParallelLogProbs(torch.autograd.Function):
    """``logits [N, V/tensor]``, targets ``[N]`` (global ids) -> log-probabilities ``[N]`` float32.

    Columns from ``valid`` on are vocabulary padding: probability 0, gradient 0. The forward takes three
    all-reduces of one number per position over the tensor ranks, the backward none.
    """

    @staticmethod
    def forward(
        ctx: Any, logits_NV: Tensor, targets_N: Tensor, start: int, valid: int, group: dist.ProcessGroup
    ) -> Tensor:
        logits_NV = logits_NV.float()
        if valid < logits_NV.shape[-1]:
            padding_V = torch.arange(logits_NV.shape[-1], device=logits_NV.device) >= valid
            logits_NV = logits_NV.masked_fill(padding_V, float("-inf"))
        maximum_N1 = logits_NV.amax(dim=-1, keepdim=True)
        dist.all_reduce(maximum_N1, op=dist.ReduceOp.MAX, group=group)
        probabilities_NV = (logits_NV - maximum_N1).exp_()
        total_N1 = probabilities_NV.sum(dim=-1, keepdim=True)
        dist.all_reduce(total_N1, group=group)
        local_N1 = (targets_N - start).unsqueeze(-1)
        mine_N1 = (local_N1 >= 0) & (local_N1 < logits_NV.shape[-1])
        local_N1 = local_N1.clamp(0, logits_NV.shape[-1] - 1)
        target_N1 = torch.where(mine_N1, logits_NV.gather(-1, local_N1), 0.0)
        dist.all_reduce(target_N1, group=group)
        probabilities_NV /= total_N1
        ctx.save_for_backward(probabilities_NV, local_N1, mine_N1)
        return (target_N1 - maximum_N1 - total_N1.log()).squeeze(-1)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None]:
        probabilities_NV, local_N1, mine_N1 = ctx.saved_tensors
        grad_N1 = grads[0].unsqueeze(-1)
        grad_NV = probabilities_NV * -grad_N1
        grad_NV.scatter_add_(-1, local_N1, grad_N1 * mine_N1)
        return grad_NV, None, None, None, None


def response_logprobs(logits_BTV: Tensor, tokens_BT: Tensor, mask_BT: Tensor, vocabulary: int) -> Tensor:
    """Log-probability of every response token given the tokens before it; 0 elsewhere.

    Args:
        logits_BTV: this tensor rank's columns, ``logits_BTV[:, t]`` predicting token ``t + 1``.
        tokens_BT: int64.
        mask_BT: bool, True on response tokens; column 0 must be False.
        vocabulary: true vocabulary size; columns beyond it are padding and do not count.

    Returns float32 ``[B, T]`` with a graph that can be backpropagated more than once.
    """
    return logprobs_of(before_response(logits_BTV, mask_BT), tokens_BT, mask_BT, vocabulary)


def before_response(values_BTX: Tensor, mask_BT: Tensor) -> Tensor:
    """``[N, X]``: the N positions that predict a response token, in the order of ``mask_BT`` [B, T].

    ``values_BTX`` may have more than T columns. Selects rows in one step, whose backward makes one tensor of
    the size of ``values_BTX``; every further slice would make another.
    """
    row_N, column_N = mask_BT[:, 1:].nonzero(as_tuple=True)
    index_N = row_N * values_BTX.shape[1] + column_N
    return values_BTX.reshape(-1, values_BTX.shape[-1]).index_select(0, index_N)


def logprobs_of(logits_NV: Tensor, tokens_BT: Tensor, mask_BT: Tensor, vocabulary: int) -> Tensor:
    """``response_logprobs`` from the logits that ``before_response`` selects."""
    columns = logits_NV.shape[-1]
    start = parallel_state.get_tensor_model_parallel_rank() * columns
    valid = max(0, min(columns, vocabulary - start))  # 0: this rank's columns are all padding
    values_N = _VocabParallelLogProbs.apply(  # type: ignore[no-untyped-call]
        logits_NV,
        tokens_BT[:, 1:][mask_BT[:, 1:]],
        start,
        valid,
        parallel_state.get_tensor_model_parallel_group(),
    )
    zeros_BT = torch.zeros(tokens_BT.shape, dtype=torch.float32, device=logits_NV.device)
    return zeros_BT.masked_scatter(mask_BT, values_N)
