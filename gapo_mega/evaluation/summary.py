"""Held-out scores before and after training, with the standard error of their paired difference."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from gapo_mega.evaluation.files import write_text

Scores: TypeAlias = Tensor | NDArray[np.floating[Any]]

SUMMARY_FILE = "summary.json"


@dataclass(frozen=True)
class Change:
    """An objective's mean held-out score before and after training."""

    before: float
    after: float
    standard_error: float  # of the paired difference; NaN if one prompt tells none
    samples: int  # prompts

    @property
    def difference(self) -> float:
        """What training gave."""
        return self.after - self.before

    @property
    def in_standard_errors(self) -> float | None:
        """``difference / standard_error``; None if there is no standard error, or it is zero."""
        if not math.isfinite(self.standard_error) or self.standard_error == 0:
            return None
        return self.difference / self.standard_error


Summary: TypeAlias = dict[str, Change]  # by objective; empty without held-out prompts


def paired_summary(
    before: Scores, after: Scores, names: Sequence[str], samples_per_prompt: int = 1
) -> Summary:
    """Mean score of every objective before and after, with the standard error of the *paired* difference.

    ``before`` and ``after`` are ``[M, n]`` with the same prompt in the same column; with several samples a
    prompt, its columns stand side by side and are averaged first, because samples of one prompt are not
    independent. The standard error is std(d, ddof 1) / sqrt(P) of the P per-prompt differences d, and
    ``samples`` is P. With one prompt there is no standard error: NaN.
    Raises ``ValueError`` on shapes that do not fit.
    """
    before_MP = _prompt_means(before, "before", names, samples_per_prompt)
    after_MP = _prompt_means(after, "after", names, samples_per_prompt)
    if before_MP.shape != after_MP.shape:
        raise ValueError(
            f"after: found shape {tuple(after.shape)}, accepted: that of before, {tuple(before.shape)}"
        )
    prompts = before_MP.shape[1]
    objectives = {}
    for name, old_P, new_P in zip(names, before_MP, after_MP, strict=True):
        error = float(np.std(new_P - old_P, ddof=1)) / math.sqrt(prompts) if prompts > 1 else math.nan
        objectives[name] = Change(float(old_P.mean()), float(new_P.mean()), error, prompts)
    return objectives


def _prompt_means(
    scores: Scores, label: str, names: Sequence[str], samples_per_prompt: int
) -> NDArray[np.float64]:
    values: NDArray[np.float64] = torch.as_tensor(scores).detach().cpu().double().numpy()
    if values.ndim != 2 or values.shape[0] != len(names) or not values.shape[1]:
        raise ValueError(f"{label}: found shape {values.shape}, accepted: [{len(names)}, n], n >= 1")
    if values.shape[1] % samples_per_prompt:
        raise ValueError(
            f"samples_per_prompt: found {samples_per_prompt}, which does not divide the "
            f"{values.shape[1]} columns of {label}"
        )
    means: NDArray[np.float64] = values.reshape(len(names), -1, samples_per_prompt).mean(axis=2)
    return means


def write_summary(
    path: Path, summary: Summary, seconds: float, resumed: Sequence[Mapping[str, Any]] = ()
) -> None:
    """``summary`` and the run's wall-clock ``seconds`` as JSON; a missing standard error is null.

    ``resumed``: by time, where the run went on with other settings: ``step``, the steps done by then, and
    ``changed``, by setting its old and its new value.
    """
    objectives = {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(change).items()}
        for name, change in summary.items()
    }
    document: dict[str, Any] = {"objectives": objectives, "seconds": seconds}
    if resumed:
        document["resumed"] = list(resumed)
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> tuple[Summary, float]:
    """Inverse of ``write_summary``: the summary and the seconds."""
    document = json.loads(path.read_text(encoding="utf-8"))
    summary: Summary = {}
    for name, facts in document["objectives"].items():
        error = facts["standard_error"]
        summary[name] = Change(**{**facts, "standard_error": math.nan if error is None else error})
    return summary, float(document["seconds"])


def read_resumed(path: Path) -> list[Mapping[str, Any]]:
    """``resumed`` of ``write_summary``; empty where no setting changed while the run went on."""
    found: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("resumed", [])
    return found
