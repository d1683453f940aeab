"""Gram matrices rebuilt from a run's log, by each step's gradient norms and cosines."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gapo_mega.evaluation.files import config_file
from gapo_mega.evaluation.series import METRICS_FILE, Array, is_number, read_rows

# The log's names for norms and cosines of the gradients, and of their running means.
_GRADIENTS, _MEANS = ("grad_norm", "cosine"), ("averaged_norm", "averaged_cosine")
# And for the weights that a scalarizer gives.
_GIVEN = "reward_weight"


@dataclass(frozen=True)
class Recording:
    """What ``metrics.jsonl`` holds of S steps with M objectives."""

    names: list[str]
    steps: list[int]
    left_out: list[int]  # steps without finite gradients, or that the run skipped for another reason
    grams: Tensor  # [S, M, M] float64
    weights: Array  # [S, M] as logged
    averaged: Tensor | None = (
        None  # [S, M, M] of the gradients' running means, if the run's weights are of these
    )
    given: Array | None = None  # [S, M] that a safe scalarizer started from

    @property
    def seen(self) -> Tensor:
        """The Gram matrices that the run's method saw [S, M, M]."""
        return self.grams if self.averaged is None else self.averaged

    def first(self, count: int) -> Recording:
        """The same of the first ``count`` names."""
        return Recording(
            self.names[:count],
            self.steps,
            self.left_out,
            self.grams[:, :count, :count],
            self.weights[:, :count],
        )


def read_recording(
    run_dir: Path,
    names: Sequence[str],
    *,
    averaged: bool = False,
    audited: bool = False,
    given: bool = False,
) -> Recording:
    """Every step's Gram matrix and weights. Raises ``ValueError`` where there are none.

    ``averaged``: also the matrix of the gradients' running means. ``audited``: a run with a scalarizer, of
    which steps without ``names[0]``'s gradient are left aside. ``given``: also the weights that a safe
    scalarizer started from.
    """
    path = run_dir / METRICS_FILE
    rows = read_rows(path)
    kinds = [_GRADIENTS, _MEANS] if averaged else [_GRADIENTS]
    weights = ["weight", _GIVEN] if given else ["weight"]
    if audited:
        rows = [row for row in rows if f"grad_norm/{names[0]}" in row]
        if not rows:
            raise ValueError(
                f"run directory: found no audited step in {path}, accepted: a run with a scalarizer and "
                "gradients.audit_every"
            )
    for row in rows:
        _check(row, names, path, kinds, weights)
    usable = [(row, gram) for row in rows if (gram := _gram(row, names)) is not None]
    if not usable:
        raise ValueError(
            f"run directory: found {len(rows)} steps in {path}, none of them with finite gradients, "
            "accepted: a directory that a run has written"
        )
    steps = [int(row["step"]) for row, _ in usable]
    return Recording(
        names=list(names),
        steps=steps,
        left_out=sorted({int(row["step"]) for row in rows} - set(steps)),
        grams=torch.stack([gram for _, gram in usable]),
        weights=_numbers([row for row, _ in usable], "weight", names),
        averaged=_means([row for row, _ in usable], names) if averaged else None,
        given=_numbers([row for row, _ in usable], _GIVEN, names) if given else None,
    )


def _numbers(rows: Sequence[dict[str, Any]], kind: str, names: Sequence[str]) -> Array:
    return np.array([[row[f"{kind}/{name}"] for name in names] for row in rows], dtype=float)


def _means(rows: Sequence[dict[str, Any]], names: Sequence[str]) -> Tensor:
    """The matrices of the running means; finite, because the gradients of these steps are."""
    found = [_gram(row, names, _MEANS) for row in rows]
    return torch.stack([gram for gram in found if gram is not None])


def _check(
    row: dict[str, Any],
    names: Sequence[str],
    path: Path,
    kinds: Sequence[tuple[str, str]],
    weights: Sequence[str],
) -> None:
    """Raise ``ValueError`` unless norms, cosines and weights are there, each null or in its range."""
    most = 1 + 1e-6  # a logged cosine is rounded
    limits = {
        **{f"{norm}/{name}": (0.0, math.inf) for norm, _ in kinds for name in names},
        **{f"{kind}/{name}": (-math.inf, math.inf) for kind in weights for name in names},
        **{f"{cosine}/{a}/{b}": (-most, most) for _, cosine in kinds for a, b in combinations(names, 2)},
    }
    for key, (least, greatest) in limits.items():
        if key not in row:
            raise ValueError(
                f"{path}: step {row['step']} has no {key!r}, accepted: the metrics of every objective "
                f"in {config_file(path.parent).name} ({', '.join(names)})"
            )
        value = row[key]
        if value is not None and not (is_number(value) and least <= value <= greatest):
            raise ValueError(
                f"{path}: step {row['step']}: found {key} {value!r}, accepted: a number"
                + (f" from {least:.0f} to {greatest:.0f}" if math.isfinite(least) else "")
            )


def _gram(row: dict[str, Any], names: Sequence[str], kind: tuple[str, str] = _GRADIENTS) -> Tensor | None:
    """``G_ij = ||g_i|| ||g_j|| cos_ij``; None for a skipped step, which has no weights to compare with."""
    norm, cosine_of = kind
    norms = [row[f"{norm}/{name}"] for name in names]
    if row.get("skipped") or None in norms:
        return None
    gram = torch.diag(torch.tensor(norms, dtype=torch.float64) ** 2)
    for (i, a), (j, b) in combinations(enumerate(names), 2):
        if norms[i] == 0 or norms[j] == 0:
            continue  # their cosine is null
        cosine = row[f"{cosine_of}/{a}/{b}"]
        if cosine is None:
            return None
        gram[i, j] = gram[j, i] = norms[i] * cosine * norms[j]
    return gram
