"""What a judge's verdicts on pairs say, each pair asked in both orders."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from gapo_mega.evaluation.intervals import Estimate, Resampling, estimates

Outcome = Literal["model", "against", "neither"]


@dataclass(frozen=True)
class Judgement:
    """One prompt: what the judge preferred, with the model's response first and with it second.

    None: the judge gave no verdict. ``asked`` is false where both responses are the same text.
    """

    first: Outcome | None
    second: Outcome | None
    asked: bool = True

    @property
    def share(self) -> float:
        """1: the model in both orders; 0: the other in both; a verdict for neither, or none, counts half."""
        return (_POINTS.get(self.first, 0.5) + _POINTS.get(self.second, 0.5)) / 2


_POINTS: dict[Outcome | None, float] = {"model": 1.0, "against": 0.0}


@dataclass(frozen=True)
class Judged:
    """A model against another by one rubric.

    Attributes:
        share: mean of ``Judgement.share``: 0.5 is a draw.
        wins, ties, losses: shares of the prompts. A win needs both orders (Zheng et al. 2023).
        consistent: share of the asked prompts with the same preference in both orders; None: none was asked.
        first: share of the verdicts for one of the two that took the response that came first; 0.5 is a judge
            without a bias. None: there are no such verdicts.
        silent: requests without a verdict.
    """

    rubric: str
    model: str
    against: str
    share: Estimate
    wins: float
    ties: float
    losses: float
    consistent: float | None
    first: float | None
    silent: int
    prompts: int


def judged(rubric: str, model: str, against: str, judgements: Sequence[Judgement], how: Resampling) -> Judged:
    """The numbers of one pair of models, from a judgement for every prompt."""
    shares_P = np.array([each.share for each in judgements])
    wins = float(np.mean([(each.first, each.second) == ("model", "model") for each in judgements]))
    losses = float(np.mean([(each.first, each.second) == ("against", "against") for each in judgements]))
    asked = [each for each in judgements if each.asked]
    placed = [each.first == "model" for each in asked if each.first in _POINTS]
    placed += [each.second == "against" for each in asked if each.second in _POINTS]
    return Judged(
        rubric=rubric,
        model=model,
        against=against,
        share=estimates(shares_P[None], how)[0],
        wins=wins,
        ties=1 - wins - losses,
        losses=losses,
        consistent=_mean([each.first == each.second and each.first is not None for each in asked]),
        first=_mean(placed),
        silent=sum((each.first is None) + (each.second is None) for each in asked),
        prompts=len(judgements),
    )


def _mean(values: Sequence[bool]) -> float | None:
    return float(np.mean(values)) if values else None
