"""Log-probabilities of given tokens from vocabulary-parallel logits.

They are those of the distribution that the tokens were drawn from, with the steps of transformers'
``generate`` in its order: repetition penalty, temperature, and the tokens that top-k and top-p kept. The kept
tokens are those of the rollout, a constant: which tokens a policy keeps does not change in a neighbourhood of
its parameters (DeepSeek-V3.2, arXiv 2512.02556, section 3.1, calls it "keep sampling mask").

Megatron's ``vocab_parallel_cross_entropy`` allows one backward only. The function here allows several where
its caller wants them, leaves out the vocabulary's padding, and computes only the positions that predict a
response token. Like Megatron's it overwrites the logits: tensors of this size are not made without need.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Literal

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from torch import Tensor

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.model import context
from gapo_mega.types import KeptTokens, TokenBatch


@dataclass(frozen=True)
class Distribution:
    """How logits become probabilities; the defaults are the plain softmax."""

    vocabulary: int  # true size: further columns are padding, without probability
    temperature: float = 1.0
    repetition_penalty: float = 1.0

    @classmethod
    def of(cls, vocabulary: int, sampling: SamplingParameters) -> Distribution:
        """The one that ``sampling`` draws from, but for the tokens it keeps, which batches carry.

        Greedy responses have one outcome; what is measured of them is at temperature 1.
        """
        return cls(vocabulary, sampling.temperature or 1.0, sampling.repetition_penalty)


@dataclass(eq=False)
class Backwards:
    """Of one graph; ``last``: no other follows the next one, which may then overwrite what it needs."""

    last: bool


# Of the entropy of a token's distribution: not computed, computed without a graph, or with one.
Entropy = Literal["none", "measured", "trained"]

_CHUNK = 2**23  # elements of the logits whose logarithms are in memory at once

SEVERAL = Backwards(last=False)  # whoever knows when the last one comes has an object of their own


@dataclass(frozen=True)
class Wanted:
    """What a forward gives of the response tokens.

    Attributes:
        chunk: positions whose logits are in memory at once, over all sequences of a microbatch; 0: all.
        on_batch: called with the batch, as it lies, before its forward.
        on_rows: called, if the batch is packed, before the output layer runs, with int64 ``[R]`` on the host:
            the number of the sequence that each row of its input is of, over all tensor ranks.
        tells_routers: the routers of experts learn which tokens are no padding.
    """

    distribution: Distribution
    backwards: Backwards = SEVERAL
    entropy: Entropy = "none"
    chunk: int = 0
    on_batch: Callable[[TokenBatch], None] | None = None
    on_rows: Callable[[Tensor], None] | None = None
    tells_routers: bool = False


@dataclass(frozen=True)
class _Edits:
    """What is done to this rank's logits ``[N, V/tensor]`` before the softmax."""

    temperature: float
    penalty: float
    penalized: tuple[Tensor, Tensor] | None  # rows and columns of tokens that occurred; may repeat
    dropped_NV: Tensor | None  # bool, or one row [1, V]: without probability

    def apply(self, logits_NV: Tensor) -> tuple[Tensor, Tensor | None]:
        """The edited logits in float32, not yet divided by the temperature, and the penalties' factors.

        Writes into ``logits_NV`` if that is float32.
        """
        edited_NV, factors_P = logits_NV.detach().float(), None
        if self.penalized is not None:
            before_P = edited_NV[self.penalized]
            factors_P = torch.where(before_P < 0, self.penalty, 1 / self.penalty)
            edited_NV.index_put_(self.penalized, before_P * factors_P)
        if self.dropped_NV is not None:
            edited_NV.masked_fill_(self.dropped_NV, float("-inf"))
        return edited_NV, factors_P


class _VocabParallelLogProbs(torch.autograd.Function):
    """``logits [N, V/tensor]``, targets ``[N]`` (global ids) -> log-probabilities, entropies ``[N]`` float32.

    Dropped columns have probability 0 and gradient 0. The forward takes three all-reduces of one number per
    position over the tensor ranks, a fourth one for the entropy, the backward none. One tensor of the logits'
    size in float32 is all that the forward needs, and the last backward, too; autograd refuses another one
    then. Entropies that are not asked for are 0.
    """

    @staticmethod
    def forward(
        ctx: Any,
        logits_NV: Tensor,
        targets_N: Tensor,
        start: int,
        edits: _Edits,
        group: dist.ProcessGroup,
        backwards: Backwards,
        entropy: Entropy,
    ) -> tuple[Tensor, Tensor]:
        weights_NV, factors_P = edits.apply(logits_NV)
        maximum_N1 = weights_NV.amax(dim=-1, keepdim=True)
        dist.all_reduce(maximum_N1, op=dist.ReduceOp.MAX, group=group)
        local_N1 = (targets_N - start).unsqueeze(-1)
        mine_N1 = (local_N1 >= 0) & (local_N1 < weights_NV.shape[-1])
        local_N1 = local_N1.clamp(0, weights_NV.shape[-1] - 1)
        target_N1 = torch.where(mine_N1, weights_NV.gather(-1, local_N1), 0.0)
        dist.all_reduce(target_N1, group=group)
        weights_NV.sub_(maximum_N1)
        if edits.temperature != 1.0:
            weights_NV.div_(edits.temperature)
        total_N1 = weights_NV.exp_().sum(dim=-1, keepdim=True)
        dist.all_reduce(total_N1, group=group)
        entropy_N1 = torch.zeros_like(total_N1)
        if entropy != "none":
            # - sum p log p with p = w / total
            for rows in _chunks(weights_NV):
                entropy_N1[rows] = torch.special.entr(weights_NV[rows]).sum(dim=-1, keepdim=True)
            dist.all_reduce(entropy_N1, group=group)
            entropy_N1 = total_N1.log() + entropy_N1 / total_N1
        ctx.save_for_backward(weights_NV, total_N1, local_N1, mine_N1, entropy_N1)
        ctx.temperature, ctx.penalized, ctx.factors_P = edits.temperature, edits.penalized, factors_P
        ctx.backwards, ctx.trained = backwards, entropy == "trained"
        values_N = ((target_N1 - maximum_N1) / edits.temperature - total_N1.log()).squeeze(-1)
        entropy_N = entropy_N1.squeeze(-1).clone()
        if not ctx.trained:
            ctx.mark_non_differentiable(entropy_N)
        return values_N, entropy_N

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None, None, None, None, None]:
        weights_NV, total_N1, local_N1, mine_N1, entropy_N1 = ctx.saved_tensors
        grad_N1 = grads[0].unsqueeze(-1) / ctx.temperature
        # The weights over their total are the probabilities.
        factor_N1 = -grad_N1 / total_N1
        if not ctx.trained:
            grad_NV = weights_NV.mul_(factor_N1) if ctx.backwards.last else weights_NV * factor_N1
        else:
            # dH / dz_j = -p_j (log p_j + H), and w log w is there only before w is overwritten.
            slope_N1 = -grads[1].unsqueeze(-1) / ctx.temperature / total_N1
            factor_N1 = factor_N1 + slope_N1 * (entropy_N1 - total_N1.log())
            grad_NV = weights_NV if ctx.backwards.last else weights_NV.clone()
            for rows in _chunks(grad_NV):
                part_NV = torch.special.entr(grad_NV[rows]).mul_(slope_N1[rows])
                grad_NV[rows] = grad_NV[rows].mul_(factor_N1[rows]).sub_(part_NV)
        grad_NV.scatter_add_(-1, local_N1, grad_N1 * mine_N1)
        if ctx.factors_P is not None:
            grad_NV.index_put_(ctx.penalized, grad_NV[ctx.penalized] * ctx.factors_P)
        return grad_NV, None, None, None, None, None, None


def _chunks(values_NV: Tensor) -> Iterator[slice]:
    rows, columns = values_NV.shape
    step = max(1, _CHUNK // max(1, columns))
    return (slice(start, start + step) for start in range(0, rows, step))


def before_response(values_BTX: Tensor, mask_BT: Tensor) -> Tensor:
    """``[N, X]``: the N positions that predict a response token, in the order of ``mask_BT`` [B, T].

    ``values_BTX`` may have more than T columns. Selects rows in one step, whose backward makes one tensor of
    the size of ``values_BTX``; every further slice would make another.
    """
    row_N, column_N = mask_BT[:, 1:].nonzero(as_tuple=True)
    index_N = row_N * values_BTX.shape[1] + column_N
    return values_BTX.reshape(-1, values_BTX.shape[-1]).index_select(0, index_N)


def logprobs_of(
    logits_NV: Tensor,
    batch: TokenBatch,
    distribution: Distribution,
    backwards: Backwards = SEVERAL,
    entropy: Entropy = "none",
) -> Tensor:
    """Log-probability of every response token given the tokens before it; 0 elsewhere.

    Args:
        logits_NV: this tensor rank's columns at the positions that predict response tokens, in the order of
            the mask, as ``before_response`` selects them; with context parallelism, at those of this rank.
            Overwritten if float32, after which a view no longer tells its place in the graph.
        batch: column 0 of the mask must be False.
        distribution: what the tokens were drawn from.
        backwards: whether the next backward is the last.
        entropy: of the distribution that every response token was drawn from, in nats.

    Returns float32 ``[B, T]`` with a graph. With entropies it is ``[B, 2 T]``: those of the positions follow
    the log-probabilities, so that whoever takes gradients of losses takes them as more of the same.
    """
    wanted = Wanted(distribution, backwards, entropy)
    tokens_n = context.own_tokens(batch)
    values_2n = chosen_logprobs(logits_NV, batch, wanted, tokens_n)
    return policy_at_responses(values_2n, batch, entropy, tokens_n)


def chosen_logprobs(
    logits_NV: Tensor, batch: TokenBatch, wanted: Wanted, tokens_N: Tensor | None = None
) -> Tensor:
    """Log-probabilities and entropies of response tokens, ``[2, N]`` float32 with a graph.

    ``logits_NV``: as for ``logprobs_of``, of the response tokens with numbers ``tokens_N`` in the order of
    the mask (int64); None: of all.
    """
    tokens_BT, mask_BT = batch.tokens_BT, batch.response_mask_BT
    columns = logits_NV.shape[-1]
    start = parallel_state.get_tensor_model_parallel_rank() * columns
    targets_N = tokens_BT[:, 1:][mask_BT[:, 1:]]
    found: tuple[Tensor, Tensor] = _VocabParallelLogProbs.apply(  # type: ignore[no-untyped-call]
        logits_NV,
        targets_N if tokens_N is None else targets_N[tokens_N],
        start,
        _edits(batch, wanted.distribution, start, columns, tokens_N),
        parallel_state.get_tensor_model_parallel_group(),
        wanted.backwards,
        wanted.entropy,
    )
    return torch.stack(found)


def policy_at_responses(
    values_2N: Tensor, batch: TokenBatch, entropy: Entropy, tokens_n: Tensor | None = None
) -> Tensor:
    """``[B, T]``, or ``[B, 2 T]`` with entropies, from the numbers of all response tokens; 0 elsewhere.

    ``tokens_n``: the response tokens that ``values_2N`` are of, where ranks share sequences; None: all.
    """
    mask_BT = batch.response_mask_BT
    if tokens_n is not None:
        values_2N = context.of_all_tokens(values_2N, tokens_n, int(mask_BT.sum()))
    zeros_BT = torch.zeros(mask_BT.shape, dtype=torch.float32, device=values_2N.device)
    logprobs_BT = zeros_BT.masked_scatter(mask_BT, values_2N[0])
    if entropy == "none":
        return logprobs_BT
    return torch.cat([logprobs_BT, zeros_BT.masked_scatter(mask_BT, values_2N[1])], dim=1)


def _edits(
    batch: TokenBatch, distribution: Distribution, start: int, columns: int, tokens_N: Tensor | None
) -> _Edits:
    """``distribution`` for this rank's columns ``[start, start + columns)`` and those response tokens."""
    valid = max(0, min(columns, distribution.vocabulary - start))  # 0: all of them are padding
    dropped_NV = None
    if batch.kept is not None:
        dropped_NV = _dropped(batch.kept, batch.response_mask_BT, start, columns, tokens_N)
    elif valid < columns:
        dropped_NV = (torch.arange(columns, device=batch.tokens_BT.device) >= valid)[None]
    penalty = distribution.repetition_penalty
    penalized = None if penalty == 1.0 else _before(batch, start, columns, tokens_N)
    return _Edits(distribution.temperature, penalty, penalized, dropped_NV)


def _before(batch: TokenBatch, start: int, columns: int, tokens_N: Tensor | None) -> tuple[Tensor, Tensor]:
    """For the n-th response token every token before it, prompt included, as pairs (n, local column)."""
    row_N, last_N = batch.response_mask_BT[:, 1:].nonzero(as_tuple=True)
    if tokens_N is not None:
        row_N, last_N = row_N[tokens_N], last_N[tokens_N]
    local_NT = batch.tokens_BT[row_N] - start
    position_T = torch.arange(local_NT.shape[1], device=local_NT.device)
    here_NT = (position_T <= last_N[:, None]) & (local_NT >= 0) & (local_NT < columns)
    position_P = here_NT.nonzero(as_tuple=True)
    return position_P[0], local_NT[position_P]


def _dropped(kept: KeptTokens, mask_BT: Tensor, start: int, columns: int, tokens_N: Tensor | None) -> Tensor:
    """bool ``[N, columns]``, True where a token of this rank was not kept."""
    counts_N = kept.counts_BT[mask_BT]
    every_N = torch.arange(len(counts_N), device=counts_N.device)
    number_K = every_N.repeat_interleave(counts_N)
    rows = len(counts_N)
    if tokens_N is not None:
        rows = len(tokens_N)
        row_N = torch.full_like(every_N, -1)
        row_N[tokens_N] = torch.arange(rows, device=counts_N.device)
        number_K = row_N[number_K]  # -1: of a token that is not asked for
    local_K = kept.tokens_K.long() - start
    here_K = (local_K >= 0) & (local_K < columns) & (number_K >= 0)
    dropped_NV = torch.ones(rows, columns, dtype=torch.bool, device=counts_N.device)
    dropped_NV[number_K[here_K], local_K[here_K]] = False
    return dropped_NV
