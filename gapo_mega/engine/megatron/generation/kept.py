"""Which tokens top-k and top-p left to draw from, recorded while responses are generated."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega.types import KeptTokens


class KeptRecord:
    """Collects what lanes report in any order: once for every row and step."""

    def __init__(self) -> None:
        self._rows: list[Tensor] = []  # int64, of the requests
        self._steps: list[Tensor] = []  # int64
        self._counts: list[Tensor] = []  # int64, kept tokens of that row and step
        self._tokens: list[Tensor] = []  # int32

    def add(self, rows_B: Tensor, step: int, kept_BV: Tensor) -> None:
        """What ``rows_B`` (int64, CPU) drew their token number ``step`` from: bool ``[B, V]``."""
        self._rows.append(rows_B)
        self._steps.append(torch.full_like(rows_B, step))
        self._counts.append(kept_BV.sum(dim=1).cpu())
        self._tokens.append(kept_BV.nonzero()[:, 1].int().cpu())

    def assemble(self, rows: int, steps: int) -> KeptTokens:
        """All that was added, by request and step: ``counts_BT`` is ``[rows, steps]``."""
        place_N = torch.cat(self._rows) * steps + torch.cat(self._steps)
        counts_N, tokens_K = torch.cat(self._counts), torch.cat(self._tokens)
        counts_BS = torch.zeros(rows * steps, dtype=torch.int64)
        counts_BS[place_N] = counts_N
        # Stable, so that the tokens of one draw stay in their order.
        order_K = place_N.repeat_interleave(counts_N).argsort(stable=True)
        return KeptTokens(counts_BS.view(rows, steps), tokens_K[order_K])


def at_columns(kept: KeptTokens, lengths_B: Tensor, mask_BT: Tensor) -> KeptTokens:
    """``kept`` by position of the sequences instead of by response token; the mask marks the latter."""
    steps = kept.counts_BT.shape[1]
    drawn_BS = torch.arange(steps) < lengths_B[:, None]
    counts_BT = torch.zeros(mask_BT.shape, dtype=torch.int64)
    counts_BT[mask_BT] = kept.counts_BT[drawn_BS]
    return KeptTokens(counts_BT, kept.tokens_K)
