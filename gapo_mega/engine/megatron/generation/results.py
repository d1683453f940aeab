"""Responses while they are generated, and the ``Generation`` that comes of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from gapo_mega.engine.base import SamplingParameters
from gapo_mega.engine.megatron.generation.kept import KeptRecord, at_columns
from gapo_mega.types import Generation, KeptTokens, TokenWatcher


def block_of(count: int, rank: int, ranks: int) -> range:
    """The requests of ``count`` that one of ``ranks`` answers; neighbours often have one prompt."""
    return range(rank * count // ranks, (rank + 1) * count // ranks)


class Results:
    """The responses that all lanes write; one right-padded row per request. The same on every rank.

    Only the rank that samples learns from which tokens each was drawn; ``assemble`` tells the others.
    """

    def __init__(
        self,
        requests: int,
        sampling: SamplingParameters,
        pad_id: int,
        samples_here: bool,
        watch: TokenWatcher | None = None,
    ) -> None:
        steps = sampling.max_new_tokens
        self.tokens_BS = torch.full((requests, steps), pad_id, dtype=torch.int64)
        self.logprobs_BS = torch.zeros(requests, steps)
        self.lengths_B = torch.zeros(requests, dtype=torch.int64)  # response tokens so far
        self.finished_B = torch.zeros(requests, dtype=torch.bool)
        self._pad_id = pad_id
        self._watch = watch
        self._cuts = sampling.cuts
        self._record = KeptRecord() if sampling.cuts and samples_here else None

    def accept(self, rows_B: Tensor, step: int, packet_2B: Tensor, kept_BV: Tensor | None) -> None:
        """Store token number ``step`` of the requests ``rows_B``: tokens and log-probabilities ``[2, B]``.

        ``kept_BV``: bool, what they were drawn from, on the rank that samples where top-k or top-p is used.
        """
        self.tokens_BS[rows_B, step] = packet_2B[0].long()
        self.logprobs_BS[rows_B, step] = packet_2B[1].float()
        self.lengths_B[rows_B] += 1
        if self._record is not None:
            assert kept_BV is not None
            self._record.add(rows_B, step, kept_BV)
        if self._watch is not None and len(rows_B):
            self._watch(rows_B.tolist(), packet_2B[0].long().tolist())

    def exchange(self, group: dist.ProcessGroup) -> None:
        """Give all ranks of ``group`` the rows that each has generated, its ``block_of`` them."""
        own_BX = torch.cat(
            (
                self.tokens_BS.double(),
                self.logprobs_BS.double(),
                self.lengths_B[:, None].double(),
                self.finished_B[:, None].double(),
            ),
            dim=1,
        )
        parts = [torch.empty_like(own_BX) for _ in range(group.size())]
        dist.all_gather(parts, own_BX, group=group)
        for rank, part_BX in enumerate(parts):
            rows = block_of(len(own_BX), rank, group.size())
            own_BX[rows.start : rows.stop] = part_BX[rows.start : rows.stop]
        steps = self.tokens_BS.shape[1]
        self.tokens_BS.copy_(own_BX[:, :steps])
        self.logprobs_BS.copy_(own_BX[:, steps : 2 * steps])
        self.lengths_B.copy_(own_BX[:, -2])
        self.finished_B.copy_(own_BX[:, -1])

    def assemble(self, prompts: Sequence[Sequence[int]], broadcast: Callable[[Tensor], object]) -> Generation:
        """Prompts and responses of the first requests in one tensor; those behind them have no response.

        ``broadcast`` sends from the rank that samples, in place.
        """
        prompt_lengths_B, lengths_B = torch.tensor([len(p) for p in prompts]), self.lengths_B[: len(prompts)]
        ends_B = prompt_lengths_B + lengths_B
        shape = (len(prompts), int(ends_B.max()))
        tokens_BT = torch.full(shape, self._pad_id, dtype=torch.int64)
        logprobs_BT = torch.zeros(shape)
        for row, prompt in enumerate(prompts):
            start, end, new = len(prompt), int(ends_B[row]), int(lengths_B[row])
            tokens_BT[row, :start] = torch.tensor(list(prompt))
            tokens_BT[row, start:end] = self.tokens_BS[row, :new]
            logprobs_BT[row, start:end] = self.logprobs_BS[row, :new]
        column_T = torch.arange(shape[1])
        mask_BT = (column_T >= prompt_lengths_B[:, None]) & (column_T < ends_B[:, None])
        kept = at_columns(self._kept(broadcast, len(prompts)), lengths_B, mask_BT) if self._cuts else None
        finished_B = self.finished_B[: len(prompts)]
        return Generation(tokens_BT, prompt_lengths_B, mask_BT, logprobs_BT, finished_B, kept)

    def _kept(self, broadcast: Callable[[Tensor], object], requests: int) -> KeptTokens:
        """The record of the first ``requests``, on every rank: counts by response token ``[B, S]``."""
        recorded = None if self._record is None else self._record.assemble(*self.tokens_BS.shape)
        counts_BS = torch.empty_like(self.tokens_BS) if recorded is None else recorded.counts_BT
        broadcast(counts_BS)
        size = int(counts_BS.sum())
        tokens_K = torch.empty(size, dtype=torch.int32) if recorded is None else recorded.tokens_K
        broadcast(tokens_K)
        return KeptTokens(counts_BS[:requests], tokens_K)
