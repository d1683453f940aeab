"""Errors of Gram matrices against float64, of Gaussian rows and of rows that are hard to add up."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from kernel_contenders import as_matrix, gram, make_rows
from torch import Tensor

BLOCK = 1 << 20  # elements that are widened at a time
PART = 1 << 12  # elements whose products are added up one by one
HUGE = 1e12


def reference_gram(rows: Sequence[Tensor]) -> Tensor:
    """The Gram matrix in float64, ``[m, m]`` on the CPU.

    Products are exact, and sums of short parts are added up in pairs. That makes this more accurate than
    what it judges (1e-14 where one long sum reaches 1e-11).
    """
    m = len(rows)
    total = torch.zeros(m, m, dtype=torch.float64, device=rows[0].device)
    for start in range(0, rows[0].numel(), BLOCK):
        block = torch.stack([row[start : start + BLOCK] for row in rows]).double()
        count = block.shape[1] // PART
        parts = block[:, : count * PART].reshape(m, count, PART).transpose(0, 1)
        total += (parts @ parts.transpose(1, 2)).sum(dim=0)
        rest = block[:, count * PART :]
        total += rest @ rest.T
    return total.cpu()


def error(found: Tensor, reference: Tensor) -> float:
    """``max |G - G64| / (|g_i| |g_j|)``."""
    norms = reference.diagonal().sqrt()
    return float(((found - reference).abs() / torch.outer(norms, norms)).max())


def hard_rows(count: int, n: int, dtype: torch.dtype, device: str) -> list[Tensor]:
    """Rows that are hard to add up.

    Rows of 0.1 and of 1/3, where equal products pile up and every rounding goes the same way; a row with
    one huge element; Gaussian rows.
    """
    rows = make_rows(count, n, dtype, device, seed=1)
    for row, value in zip(rows, (0.1, 1 / 3), strict=False):
        row.fill_(value)
    if count > 2:
        rows[2][n // 3] = HUGE
    return rows


def gram_errors(
    count: int, n: int, dtype: torch.dtype, device: str, with_numpy: bool
) -> list[dict[str, Any]]:
    """A record per contender of the Gram section: ``error`` and ``error_hard``, or ``failed``."""
    records: dict[str, dict[str, Any]] = {}
    for key, make in (("error", make_rows), ("error_hard", hard_rows)):
        rows = make(count, n, dtype, device)
        reference = reference_gram(rows)
        for contender in gram(rows, torch.get_num_threads(), None, with_numpy):
            record = records.setdefault(contender.name, {"contender": contender.name, "kind": contender.kind})
            try:
                record[key] = error(as_matrix(contender.run(), count), reference)
            except Exception as failure:
                if contender.kind == "ours":
                    raise
                record["failed"] = f"{type(failure).__name__}: {failure}".splitlines()[0]
    return list(records.values())
