"""Whose the rows are that experts get: of several sequences in a heap, also of other ranks' sequences."""

from __future__ import annotations

import torch
from torch import Tensor

from gapo_mega.engine.megatron.gradients.accumulator import Accumulator
from gapo_mega.engine.megatron.gradients.row_sequences import RowSequences
from gapo_mega.engine.megatron.model.experts import RowWatch


class ExpertRows(RowWatch):
    """Of the experts of one layer, in its last forward that had a graph."""

    def __init__(self, accumulator: Accumulator) -> None:
        self._accumulator = accumulator
        self._rows: list[RowSequences] = []

    def numbers(self, hidden_SBD: Tensor) -> Tensor:
        return self._accumulator.numbers(hidden_SBD)

    def dispatched(self, numbers_N: Tensor, map_NE: Tensor) -> None:
        self._rows = by_expert(numbers_N, map_NE)

    def of(self, expert: int) -> RowSequences | None:
        """The rows of one of this rank's experts; None before the first such forward."""
        return self._rows[expert] if self._rows else None


def by_expert(numbers_N: Tensor, map_NE: Tensor) -> list[RowSequences]:
    """The rows that each of E experts gets, in the order of the N, with their sequences."""
    expert_R, row_R = map_NE.t().nonzero(as_tuple=True)
    numbers_R = numbers_N[row_R]
    count, sequences = map_NE.shape[1], int(numbers_N.max()) + 1
    # Of all experts at once: a device is waited for a few times a layer, however many experts it has.
    keys_R = expert_R * sequences + numbers_R
    order_R = keys_R.argsort(stable=True)
    rows_EB = torch.bincount(keys_R, minlength=count * sequences).view(count, sequences).tolist()
    found, start = [], 0
    for rows_B in rows_EB:
        end = start + sum(rows_B)
        order_r = order_R[start:end] - start
        found.append(RowSequences(numbers_R[start:end], _runs(rows_B), order_r, of_sharers=True))
        start = end
    return found


def _runs(rows_B: list[int]) -> tuple[tuple[int, int, int], ...]:
    """Of sequences with these numbers of rows, one behind the other."""
    runs, start = [], 0
    for number, rows in enumerate(rows_B):
        if rows:
            runs.append((number, start, start + rows))
        start += rows
    return tuple(runs)
