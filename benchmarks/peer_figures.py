"""Figures of benchmarks/peers.py that follow from what the processes measured. Plain numbers only."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence
from typing import Any

from peer_entries import TORCHJD_KINDS, Entry, scope_key

Record = dict[str, Any]
Matrix = Sequence[Sequence[float]]

MEMORY = ("allocated", "resident")


def gram_error(found: Matrix, reference: Matrix) -> float:
    """``max |G - R| / (|g_i| |g_j|)`` over the first rows and columns of R; infinite if any is not finite."""
    largest = 0.0
    for i, row in enumerate(found):
        for j, value in enumerate(row):
            scale = math.sqrt(reference[i][i] * reference[j][j])
            error = abs(value - reference[i][j]) / scale if scale else math.inf
            largest = max(largest, error if math.isfinite(error) else math.inf)
    return largest


def agreement(entry: Entry, seen: Record, reference: dict[str, Matrix], tied: bool) -> Record:
    """Compare a contender's Gram matrices with the reference, as shares of ``|g_i| |g_j|``.

    ``agreement``: error of the Gram matrix of the contender's own gradients, in float64 where it has them.
    ``gram_error``: error of the one that its weights come from. None: not known.

    A method that shows nothing but its Gram matrix drops out where that is wrong.

    Raises:
        RuntimeError: another contender's gradients are not those of the reference.
    """
    if tied and entry.scope in ("last_layer", "last_block"):
        # A tied output layer's own share of the gradient: transformers does not show it.
        return {"agreement": None, "gram_error": None}
    expected = reference[scope_key(entry.scope)]
    own = None if seen["gram"] is None else gram_error(seen["gram"], expected)
    exact = gram_error(seen["exact"]["full"], reference["full"]) if "exact" in seen else own
    assert exact is not None, entry.name
    record: Record = {"agreement": exact, "gram_error": own}
    if exact > entry.tolerance:
        what = f"its Gram matrix is off by {exact:.3g} of |g_i| |g_j|, accepted: {entry.tolerance:.3g}"
        if entry.kind not in TORCHJD_KINDS or "exact" in seen:
            raise RuntimeError(f"{entry.name}: {what}")
        record["failed"] = what
    return record


def times(rounds: Sequence[tuple[float, float]]) -> Record:
    """Seconds of the whole step and of the optimizer's part."""
    whole = [seconds for seconds, _ in rounds]
    return {
        "seconds": statistics.median(whole),
        "least_seconds": min(whole),
        "round_seconds": whole,
        "optimizer_seconds": statistics.median(optimizer for _, optimizer in rounds),
    }


def add_ratios(records: Sequence[Record], gradient_bytes: int) -> None:
    """Add ratios to the step for one objective on the same stack, in the same rounds.

    ``ratio``, ``least_ratio``: of median and least seconds. ``surplus``: what the peak is higher by, in
    gradients of the whole model (N fp32 numbers).
    """
    singles = {record["stack"]: record for record in records if record["kind"] == "single"}
    for record in records:
        if "failed" in record:
            continue
        single = singles[record["stack"]]
        record["ratio"] = record["seconds"] / single["seconds"]
        record["least_ratio"] = record["least_seconds"] / single["least_seconds"]
        record["surplus"] = {
            count: (record[count]["peak_bytes"] - single[count]["peak_bytes"]) / gradient_bytes
            for count in MEMORY
        }
