"""Held-out scores before and after training: paired differences, and what they allow to say.

A difference within the rounding of float32 scores is no change, and a spread within it is none. Claims are
made with Student's t over the prompts, and for few prompts not at all.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.special import stdtrit
from torch import Tensor

from gapo_mega.evaluation.files import write_text
from gapo_mega.evaluation.standing import Standing

Scores: TypeAlias = Tensor | NDArray[np.floating[Any]]
Finding: TypeAlias = Literal[
    "better", "worse", "unclear", "too few prompts", "same on every prompt", "no change", "not known"
]

SUMMARY_FILE = "summary.json"
CONFIDENCE = 0.95
# With fewer prompts a difference may be chance whatever its standard error: the t interval takes means to be
# nearly normal, and the standard error itself is known to a quarter at best.
LEAST_PROMPTS = 10
ONE_RUN = (
    f"Intervals: {CONFIDENCE:.0%}, Student's t over the held-out prompts. They hold for this run and its "
    "seed; how much another seed changes, one run cannot tell."
)
# Units in the last place by which a score may differ without meaning anything: it is a sum of rounded terms.
_UNITS = 4


@dataclass(frozen=True)
class Change:
    """An objective's mean held-out score before and after training."""

    before: float
    after: float
    standard_error: float  # of the paired difference; NaN if one prompt tells none; 0: all differ alike
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

    @property
    def half_width(self) -> float | None:
        """Half the ``CONFIDENCE`` interval of the difference, Student's t with ``samples - 1`` degrees.

        None where there is no spread to take it from.
        """
        if self.in_standard_errors is None or self.samples < 2:
            return None
        return float(stdtrit(self.samples - 1, (1 + CONFIDENCE) / 2)) * self.standard_error

    @property
    def finding(self) -> Finding:
        """What the numbers allow to say, in the words of docs/glossary.md."""
        if not math.isfinite(self.difference):
            return "not known"
        half_width = self.half_width
        if self.difference == 0 and half_width is None:
            return "no change"
        if self.samples < LEAST_PROMPTS:
            return "too few prompts"
        if half_width is None:
            return "same on every prompt"
        if abs(self.difference) <= half_width:
            return "unclear"
        return "better" if self.difference > 0 else "worse"

    def sentence(self) -> str:
        """The finding and what it rests on, for people."""
        if self.finding == "no change":
            return "no change measured"
        if self.finding == "same on every prompt":
            return "the same change on every prompt, so there is no spread to judge it by"
        parts: list[str] = [self.finding]
        if self.finding == "too few prompts":
            parts = [
                f"too few prompts to tell a change from chance ({self.samples} of at least {LEAST_PROMPTS})"
            ]
        if self.half_width is not None:
            low, high = self.difference - self.half_width, self.difference + self.half_width
            parts.append(f"{CONFIDENCE:.0%} interval of the change {low:+.3g} to {high:+.3g}")
        return ": ".join(parts)


Summary: TypeAlias = dict[str, Change]  # by objective; empty without held-out prompts


def paired_summary(
    before: Scores,
    after: Scores,
    names: Sequence[str],
    samples_per_prompt: int = 1,
    same_response: Sequence[bool] | None = None,
) -> Summary:
    """Mean score of every objective before and after, with the standard error of the *paired* difference.

    ``before`` and ``after`` are ``[M, n]`` with the same prompt in the same column; with several samples a
    prompt, its columns stand side by side and are averaged first, because samples of one prompt are not
    independent. The standard error is std(d, ddof 1) / sqrt(P) of the P per-prompt differences d, and
    ``samples`` is P. With one prompt there is no standard error: NaN.

    Scores are rounded (float32, or the tensors' own coarser type). Two that differ by no more than that count
    as equal, and a spread of the d that is no larger is 0. Where ``same_response`` [n] is true, the policy
    gave the same response before and after: the score before counts for both, because an objective that
    scores one text twice differently measures its own noise there.
    Raises ``ValueError`` on shapes that do not fit.
    """
    before_MN = _checked(before, "before", names, samples_per_prompt)
    after_MN = _checked(after, "after", names, samples_per_prompt)
    if before_MN.shape != after_MN.shape:
        raise ValueError(
            f"after: found shape {tuple(after.shape)}, accepted: that of before, {tuple(before.shape)}"
        )
    unit = max(_unit(before), _unit(after))
    # Below the smallest normal number float32 rounds to a fixed distance.
    tiny = torch.finfo(torch.float32).tiny
    rounding_MN = _UNITS * unit * np.maximum(np.maximum(np.abs(before_MN), np.abs(after_MN)), tiny)
    equal_MN = np.abs(after_MN - before_MN) <= rounding_MN
    equal_MN &= np.isfinite(rounding_MN)  # an infinite score is no rounding of the other
    if same_response is not None:
        equal_MN |= np.asarray(same_response, dtype=bool)
    after_MN = np.where(equal_MN, before_MN, after_MN)
    rounding_MP = _prompt_means(np.where(equal_MN, 0.0, rounding_MN), samples_per_prompt)
    before_MP, after_MP = (_prompt_means(x, samples_per_prompt) for x in (before_MN, after_MN))
    return {
        name: Change(
            float(old_P.mean()), float(new_P.mean()), _standard_error(new_P - old_P, r_P), len(old_P)
        )
        for name, old_P, new_P, r_P in zip(names, before_MP, after_MP, rounding_MP, strict=True)
    }


def _standard_error(difference_P: NDArray[np.float64], rounding_P: NDArray[np.float64]) -> float:
    """Of the mean difference: NaN for one prompt, 0 where the differences spread by rounding alone."""
    prompts = len(difference_P)
    if prompts < 2:
        return math.nan
    spread = float(np.std(difference_P, ddof=1))
    if spread <= math.sqrt(float(np.square(rounding_P).sum()) / (prompts - 1)):
        return 0.0
    return spread / math.sqrt(prompts)


def _unit(scores: Scores) -> float:
    """The relative distance of neighbouring scores: float32's, or that of a coarser type."""
    dtype = torch.as_tensor(scores).dtype
    own = torch.finfo(dtype).eps if dtype.is_floating_point else 0.0
    return max(own, torch.finfo(torch.float32).eps)


def _checked(
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
    return values


def _prompt_means(values_MN: NDArray[np.float64], samples_per_prompt: int) -> NDArray[np.float64]:
    means: NDArray[np.float64] = values_MN.reshape(len(values_MN), -1, samples_per_prompt).mean(axis=2)
    return means


def write_summary(
    path: Path,
    summary: Summary,
    seconds: float,
    resumed: Sequence[Mapping[str, Any]] = (),
    standing: Standing | None = None,
) -> None:
    """``summary`` and the run's wall-clock ``seconds`` as JSON; a number that is not known is null.

    ``resumed``: by time, where the run went on with other settings: ``step``, the steps done by then, and
    ``changed``, by setting its old and its new value. ``standing``: of which step the numbers are.
    """
    objectives = {
        name: {key: value if math.isfinite(value) else None for key, value in asdict(change).items()}
        for name, change in summary.items()
    }
    document: dict[str, Any] = {"objectives": objectives, "seconds": seconds}
    if standing is not None:
        document |= standing.as_dict()
    if resumed:
        document["resumed"] = list(resumed)
    write_text(path, json.dumps(document, indent=2, allow_nan=False) + "\n")


def read_summary(path: Path) -> tuple[Summary, float]:
    """Inverse of ``write_summary``: the summary and the seconds."""
    document = json.loads(path.read_text(encoding="utf-8"))
    summary: Summary = {}
    for name, facts in document["objectives"].items():
        known: dict[str, Any] = {key: math.nan if value is None else value for key, value in facts.items()}
        summary[name] = Change(**known)
    return summary, float(document["seconds"])


def read_resumed(path: Path) -> list[Mapping[str, Any]]:
    """``resumed`` of ``write_summary``; empty where no setting changed while the run went on."""
    found: list[Mapping[str, Any]] = json.loads(path.read_text(encoding="utf-8")).get("resumed", [])
    return found


def read_standing(path: Path) -> Standing | None:
    """Of which step the numbers of a summary are; None where an earlier version wrote it."""
    return Standing.of_summary(json.loads(path.read_text(encoding="utf-8")))
