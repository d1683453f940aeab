"""An order of combinations that meets every pair and every triple of values early.

Faults of settings that do not go together show, nearly always, with two or three of them: a few
combinations, each new in as many triples as possible, meet every triple that is valid at all.
"""

from __future__ import annotations

import itertools
import random
from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

Row = Sequence[str]  # a value of every axis
Subsets = NDArray[np.int64]  # [rows, subsets of axes]: a number for every set of values that is met


def covering_order(rows: Sequence[Row], seed: int) -> tuple[list[int], int]:
    """Indices of all ``rows``, and how many of the first ones meet every triple of values.

    Greedy: first what meets most new pairs, until all are met, then the same with triples; the rest is
    shuffled. Equally good ones are taken in an order by ``seed``.
    """
    shuffled = list(range(len(rows)))
    random.Random(seed).shuffle(shuffled)
    if not shuffled:
        return [], 0
    mixed = [rows[index] for index in shuffled]
    chosen: list[int] = []
    for size in (2, 3):
        if size <= len(mixed[0]):
            chosen += _greedy(subsets(mixed, size), chosen)
    taken = set(chosen)
    rest = [position for position in range(len(mixed)) if position not in taken]
    return [shuffled[position] for position in [*chosen, *rest]], len(chosen)


def subsets(rows: Sequence[Row], size: int) -> Subsets:
    """Numbers of the sets of ``size`` values, from 0 without gaps; equal numbers mean equal sets."""
    axes = list(zip(*rows, strict=True))
    codes = [np.unique(values, return_inverse=True)[1] for values in axes]
    columns, first = [], 0
    for chosen in itertools.combinations(codes, size):
        sizes = [int(code.max()) + 1 for code in chosen]
        _, numbers = np.unique(np.ravel_multi_index(chosen, sizes), return_inverse=True)
        columns.append(numbers + first)
        first += int(numbers.max()) + 1
    return np.stack(columns, axis=1).astype(np.int64)


def _greedy(met: Subsets, before: Sequence[int]) -> list[int]:
    """Rows that, with those of ``before``, meet every subset; each meets most of what is new."""
    new = np.ones(int(met.max()) + 1, dtype=bool)
    new[met[list(before)]] = False
    found: list[int] = []
    # What a row meets anew only gets less: rows with too small an old number need no new one.
    bound = np.full(len(met), met.shape[1])
    while new.any():
        best, most = -1, 0
        for block in _blocks(bound):
            if bound[block[0]] <= most:
                break
            bound[block] = new[met[block]].sum(axis=1)
            top = int(bound[block].argmax())
            if bound[block[top]] > most:
                best, most = int(block[top]), int(bound[block[top]])
        found.append(best)
        new[met[best]] = False
    return found


def _blocks(bound: NDArray[np.int64], size: int = 512) -> list[NDArray[np.int64]]:
    """All rows by falling bound, a block at a time."""
    order = np.argsort(-bound, kind="stable")
    return [order[start : start + size] for start in range(0, len(order), size)]
