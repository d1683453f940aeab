"""What the responses of several models to the same prompts say: means, intervals, paired differences."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Literal

import numpy as np

from gapo_mega.evaluation.answers import Answer
from gapo_mega.evaluation.intervals import Estimate, Resampling, estimates
from gapo_mega.evaluation.judged import Judged
from gapo_mega.evaluation.refusals import refuses
from gapo_mega.evaluation.series import Array
from gapo_mega.evaluation.summary import LEAST_PROMPTS

Finding = Literal["higher", "lower", "unclear", "equal", "same on every prompt", "too few prompts"]


@dataclass(frozen=True)
class Asked:
    """What is to be measured of responses.

    Attributes:
        objectives: names of the scores, in order.
        samples: responses to every prompt.
        thresholds: by objective: the share of responses whose score is above is a measure, too.
        refusals: name of a list, and its phrases.
        distinct: lengths n of the n-grams of distinct-n.
    """

    objectives: Sequence[str]
    samples: int
    thresholds: Mapping[str, float]
    refusals: tuple[str, Sequence[str]]
    distinct: Sequence[int] = (1, 2)


@dataclass(frozen=True)
class ModelResult:
    """One model: by measure its mean, and the shares of distinct n-grams (None: no response is that long)."""

    name: str
    estimates: dict[str, Estimate]
    distinct: dict[int, float | None]


@dataclass(frozen=True)
class Difference:
    """A measure of ``model`` less that of ``against``, prompt by prompt."""

    model: str
    against: str
    measure: str
    estimate: Estimate
    higher: float  # shares of the prompts
    equal: float
    lower: float
    prompts: int

    @property
    def finding(self) -> Finding:
        """What the interval allows to say."""
        low, high = self.estimate.low, self.estimate.high
        if self.equal == 1:
            return "equal"
        if self.prompts < LEAST_PROMPTS:
            return "too few prompts"
        if low is None or high is None:
            return "same on every prompt"
        return "higher" if low > 0 else "lower" if high < 0 else "unclear"


@dataclass(frozen=True)
class Comparison:
    """All models. ``measures``: by key, what people read."""

    prompts: int
    samples: int
    how: Resampling
    measures: dict[str, str]
    models: list[ModelResult]
    differences: list[Difference]  # of every later model to every earlier one
    judged: list[Judged] = field(default_factory=list)

    def of(self, model: str, against: str) -> list[Difference]:
        """The differences of one pair, in the order of the measures."""
        return [d for d in self.differences if (d.model, d.against) == (model, against)]


def measures_of(answers: Sequence[Answer], asked: Asked) -> dict[str, Array]:
    """By measure its ``[P]`` means over the samples of each prompt.

    Keys: ``objective/NAME``, ``average`` (over several objectives), ``above/NAME`` (the share beyond its
    threshold), ``kl`` (nats a response; left out where it was not measured), ``tokens``, ``finished`` and
    ``refusals`` (shares).
    """
    assert answers and len(answers) % asked.samples == 0

    def mean(values: Sequence[float]) -> Array:
        found: Array = np.asarray(values, dtype=np.float64).reshape(-1, asked.samples).mean(axis=1)
        return found

    scores = {name: [answer.scores[name] for answer in answers] for name in asked.objectives}
    found = {f"objective/{name}": mean(values) for name, values in scores.items()}
    if len(asked.objectives) > 1:
        found["average"] = np.mean(list(found.values()), axis=0)
    for name, threshold in asked.thresholds.items():
        found[f"above/{name}"] = mean([score > threshold for score in scores[name]])
    kl = [answer.kl for answer in answers if answer.kl is not None]
    if len(kl) == len(answers):
        found["kl"] = mean(kl)
    found["tokens"] = mean([answer.tokens for answer in answers])
    found["finished"] = mean([answer.finished for answer in answers])
    found["refusals"] = mean([refuses(answer.response, asked.refusals[1]) for answer in answers])
    return found


def distinct(responses: Sequence[str], length: int) -> float | None:
    """Distinct-n (Li et al. 2016): different n-grams of words over all n-grams; None where there are none.

    It falls with the number of words, so that only models with the same prompts and samples compare.
    """
    words = [response.split() for response in responses]
    grams = [tuple(each[start : start + length]) for each in words for start in range(len(each) - length + 1)]
    return len(set(grams)) / len(grams) if grams else None


def compare(answers: Mapping[str, Sequence[Answer]], asked: Asked, how: Resampling) -> Comparison:
    """Measure every model, and every two of them against each other. All have answered the same prompts."""
    measured = {name: measures_of(each, asked) for name, each in answers.items()}
    prompts = len(next(iter(answers.values()))) // asked.samples
    pairs = [(later, earlier) for earlier, later in combinations(measured, 2)]
    rows: dict[tuple[str, str | None, str], Array] = {
        (name, None, key): values_P for name, found in measured.items() for key, values_P in found.items()
    }
    for later, earlier in pairs:
        for key in measured[later]:
            if key in measured[earlier]:
                rows[later, earlier, key] = measured[later][key] - measured[earlier][key]
    found = dict(zip(rows, estimates(np.stack(list(rows.values())), how), strict=True))
    models = [
        ModelResult(
            name,
            {key: found[name, None, key] for key in measured[name]},
            {n: distinct([answer.response for answer in answers[name]], n) for n in asked.distinct},
        )
        for name in measured
    ]
    differences = [
        _difference(later, earlier, key, values_P, found[later, earlier, key])
        for (later, earlier, key), values_P in rows.items()
        if earlier is not None
    ]
    return Comparison(prompts, asked.samples, how, _labels(measured, asked), models, differences)


def _difference(model: str, against: str, measure: str, values_P: Array, estimate: Estimate) -> Difference:
    higher, lower = float((values_P > 0).mean()), float((values_P < 0).mean())
    equal = float((values_P == 0).mean())
    return Difference(model, against, measure, estimate, higher, equal, lower, len(values_P))


def _labels(measured: Mapping[str, Mapping[str, Array]], asked: Asked) -> dict[str, str]:
    fixed = {
        "kl": "KL to the reference (nats)",
        "tokens": "length (tokens)",
        "finished": "finished (share)",
        "refusals": f"refusals ({asked.refusals[0]}, share)",
    }
    above = {f"above/{name}": f"{name} > {limit:g} (share)" for name, limit in asked.thresholds.items()}
    names = {f"objective/{name}": name for name in asked.objectives}
    keys = dict.fromkeys(key for found in measured.values() for key in found)
    labels = {**names, "average": "average of objectives", **above, **fixed}
    return {key: label for key, label in labels.items() if key in keys}
