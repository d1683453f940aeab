"""What a supervised run reports of its held-out data."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TypeVar

from rich.console import Console
from rich.table import Table

from gapo_mega.data.pairs import Lengths

Item = TypeVar("Item")

_LARGEST_EXPONENT = math.log(sys.float_info.max)


def of_pairs(scores: Sequence[tuple[float, float]], lengths: Sequence[Lengths]) -> dict[str, float]:
    """How well scores of (chosen, rejected) predict the preferences.

    ``accuracy`` counts ties as half; ``standard_error`` is that of a share, sqrt(p (1 - p) / n), and left out
    where p is 0 or 1: what never varied says nothing about its spread.
    ``length_baseline`` is the better of "the longer response wins" and "the shorter one wins" on the same
    pairs, ``matched_accuracy`` the accuracy on pairs whose lengths differ by at most a tenth, where length
    tells nothing. ``loss`` is the Bradley-Terry loss, ``margin`` the mean difference of the scores.

    Args:
        scores: of every pair.
        lengths: tokens of the responses of every pair.
    """
    count = len(scores)
    assert count and count == len(lengths)
    margins = [chosen - rejected for chosen, rejected in scores]
    accuracy = _share_right(margins)
    result = {
        "pairs": float(count),
        "accuracy": accuracy,
        **_standard_error("standard_error", accuracy, count),
        "loss": sum(math.log1p(math.exp(-abs(m))) + max(-m, 0.0) for m in margins) / count,
        "margin": sum(margins) / count,
    }
    longer = longer_wins(lengths)
    if longer is not None:
        result["length_baseline"] = max(longer, 1 - longer)
    matched = length_matched(margins, lengths)
    if matched:
        share = _share_right(matched)
        result |= {
            "matched_pairs": float(len(matched)),
            "matched_accuracy": share,
            **_standard_error("matched_standard_error", share, len(matched)),
        }
    return result


def longer_wins(lengths: Sequence[Lengths]) -> float | None:
    """Share of the pairs of unequal length whose longer response is the chosen one; ``None`` without any.

    A reward model that only counts tokens is right about this share of them.
    """
    unequal = [(chosen, rejected) for chosen, rejected in lengths if chosen != rejected]
    return sum(chosen > rejected for chosen, rejected in unequal) / len(unequal) if unequal else None


def length_matched(items: Sequence[Item], lengths: Sequence[Lengths], tolerance: float = 0.1) -> list[Item]:
    """The ``items`` whose two lengths differ by at most ``tolerance`` of the longer one."""
    return [
        item
        for item, (chosen, rejected) in zip(items, lengths, strict=True)
        if abs(chosen - rejected) <= tolerance * max(chosen, rejected)
    ]


def of_chats(logprobs: Sequence[float], tokens: Sequence[int]) -> dict[str, float]:
    """Mean negative log-likelihood of the learned tokens in nats, and its exponential.

    ``perplexity`` is left out where it is beyond double precision.
    """
    count = sum(tokens)
    loss = -sum(logprobs) / count
    found = {"chats": float(len(tokens)), "tokens": float(count), "loss": loss}
    return found | ({"perplexity": math.exp(loss)} if loss < _LARGEST_EXPONENT else {})


def print_table(measured: Mapping[str, float], directory: Path) -> None:
    """The measures as a table, and where the run's files are."""
    table = Table(title="held-out data")
    table.add_column("measure")
    table.add_column("value", justify="right")
    for name, value in measured.items():
        table.add_row(name.replace("_", " "), f"{value:.4g}")
    console = Console()
    if measured:
        console.print(table)
    console.print(f"run: {directory}", soft_wrap=True)


def _share_right(margins: Sequence[float]) -> float:
    return sum(1.0 if m > 0 else 0.5 if m == 0 else 0.0 for m in margins) / len(margins)


def _standard_error(name: str, share: float, count: int) -> dict[str, float]:
    return {name: math.sqrt(share * (1 - share) / count)} if 0 < share < 1 else {}
