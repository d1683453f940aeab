"""What each aggregation method would have done at the steps of a recording.

Methods differ in the length of their direction, so the comparison takes steps of *unit* length. The change
that such a step promises an objective, relative to its steepest one, is the cosine of the direction with its
gradient.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from gapo_mega.aggregation import Aggregator, Diagnosis, build, diagnose, methods
from gapo_mega.config import Config
from gapo_mega.evaluation.files import CONFIG_FILE
from gapo_mega.evaluation.recording import Recording
from gapo_mega.evaluation.series import Array
from gapo_mega.evaluation.terms import cosines_with_direction
from gapo_mega.ops import Aggregated
from gapo_mega.scalarization.safe import SafeWeights

# Steps from which on the wait is worth a progress bar.
MANY_STEPS = 1000
# The log's norms and cosines hold the Gram matrix up to a few units in the last place.
_AGREEMENT = 1e-9


@dataclass(frozen=True)
class Candidate:
    """A method with its options; ``note`` is what a reader should know about them."""

    label: str
    aggregator: Aggregator
    note: str


@dataclass(frozen=True)
class Verdict:
    """What one method does at each of S steps to M objectives."""

    candidate: Candidate
    weights: Array  # [S, M]
    predicted_change: Array  # [S, M] (G w)_i
    cosines: Array  # [S, M]; 0 where the direction or the gradient is zero
    direction_norms: Array  # [S]
    hurt: NDArray[np.bool_]  # [S, M]
    corner: NDArray[np.bool_]  # [S]

    @property
    def conflict(self) -> NDArray[np.bool_]:
        """Steps that hurt an objective."""
        return np.asarray(self.hurt.any(axis=1))

    @property
    def shares(self) -> Array:
        """Weights over the sum of their absolute values; 0 where all are 0."""
        total = np.abs(self.weights).sum(axis=1, keepdims=True)
        shares: Array = self.weights / np.where(total == 0, 1.0, total)
        return shares


class _Replayed(SafeWeights):
    """What a run's ``SafeWeights`` started from at every step of its recording, [S, M]."""

    def __init__(self, given_SM: Array) -> None:
        super().__init__()
        self._left = iter(torch.from_numpy(given_SM))
        self.take(next(self._left))

    def commit(self, found: Aggregated) -> None:
        following = next(self._left, None)
        if following is not None:
            self.take(following)


def candidates(config: Config, given_SM: Array | None = None) -> list[Candidate]:
    """The run's own method with its options, then all others with their defaults.

    A run whose scalarizer leaves one gradient has no method of its own among them: ``of_scalarizer`` judges
    it. ``given_SM``: what a safe scalarizer started from at each step, by the log.
    """
    if config.one_signal is not None:
        return _by_default()
    if config.scalarization is not None:
        assert given_SM is not None
        label = _labelled(config.scalarization.row, config.scalarization.options)
        return [Candidate(label, _Replayed(given_SM), "this run"), *_by_default()]
    given = config.aggregation
    own = build(given.name, **given.options)
    found = [Candidate(_label(own, given.options), own, _note(own, given.options, "this run"))]
    return found + [each for each in _by_default(given.name) if not _same_direction(each.aggregator, own)]


def _by_default(but: str | None = None) -> list[Candidate]:
    """All methods in the variants that they declare; ``but`` only if it declares some."""
    found = []
    for name, method in sorted(methods().items()):
        for options in method.variants or (() if name == but else ({},)):
            aggregator = build(name, **options)
            found.append(Candidate(_label(aggregator, options), aggregator, _note(aggregator, options)))
    return found


def of_scalarizer(label: str, recording: Recording) -> Verdict:
    """What a scalarizer's gradient, the last of the recording's names, did to the objectives before it.

    It is no combination of their gradients with weights for all samples, so its weights are NaN.
    """
    count = len(recording.names) - 1
    one_hot = torch.eye(count + 1, dtype=torch.float64)[-1]
    candidate = Candidate(label, build("weighted_sum", weights=one_hot.tolist()), "this run, one gradient")
    (found,) = judge([candidate], recording)
    return replace(
        found,
        weights=np.full((len(recording.steps), count), math.nan),
        predicted_change=found.predicted_change[:, :count],
        cosines=found.cosines[:, :count],
        hurt=found.hurt[:, :count],
        corner=np.zeros(len(recording.steps), dtype=bool),
    )


def _same_direction(a: Aggregator, b: Aggregator) -> bool:
    """Whether they differ at most in the direction's length and in what they do with zero gradients."""
    if type(a) is not type(b):
        return False
    plain: dict[str, Any] = {"scale": "none", "zero_gradient": "exclude"}
    return replace(a, **plain) == replace(b, **plain)


def _label(aggregator: Aggregator, options: Mapping[str, Any]) -> str:
    options = {name: getattr(aggregator, name) for name in aggregator.always_shown} | dict(options)
    return _labelled(aggregator.name, options)


def _labelled(name: str, options: Mapping[str, Any]) -> str:
    shown = [
        f"{key}={value:g}" if isinstance(value, float) else f"{key}={value}" for key, value in options.items()
    ]
    return " ".join([name, *shown])


def _note(aggregator: Aggregator, options: Mapping[str, Any], *notes: str) -> str:
    option = aggregator.equal_when_left_out
    if option is not None and options.get(option) is None:
        notes = (*notes, f"equal {option}")
    return ", ".join(notes)


def judge(asked: Sequence[Candidate], recording: Recording) -> list[Verdict]:
    """Ask every candidate at every step, in the order of the steps: a method may remember earlier ones."""
    weights: list[list[Tensor]] = [[] for _ in asked]
    found: list[list[Diagnosis]] = [[] for _ in asked]
    steps = tqdm(recording.steps, desc="audit", unit="step", disable=len(recording.steps) < MANY_STEPS)
    for step, gram, seen in zip(steps, recording.grams, recording.seen, strict=True):
        for index, candidate in enumerate(asked):
            try:
                answer = candidate.aggregator.weigh_or_raise(seen)
            except ValueError as error:
                raise ValueError(f"step {step}, {candidate.label}: {error}") from error
            candidate.aggregator.commit(answer)
            weights[index].append(answer.weights)
            found[index].append(diagnose(gram, answer.weights))
    return [_verdict(*parts) for parts in zip(asked, weights, found, strict=True)]


def _verdict(candidate: Candidate, weights: Sequence[Tensor], found: Sequence[Diagnosis]) -> Verdict:
    count = len(weights[0])
    weights_SM = torch.stack(list(weights)).numpy()
    predicted_SM = torch.stack([d.predicted_change for d in found]).numpy()
    norms_SM = torch.stack([d.norms for d in found]).numpy()
    return Verdict(
        candidate=candidate,
        weights=weights_SM,
        predicted_change=predicted_SM,
        cosines=cosines_with_direction(norms_SM, weights_SM, predicted_SM),
        direction_norms=np.array([d.direction_norm for d in found]),
        hurt=np.array([[i in d.hurt for i in range(count)] for d in found]),
        corner=np.array([d.corner for d in found]),
    )


def disagreement(own: Verdict, recording: Recording) -> str | None:
    """A warning where the run's own method gives other weights than the log; else None.

    The test compares what the difference changes, ``G (w - w')`` in units of the gradients: where gradients
    are nearly parallel, the weights may differ by far more than rounding while the direction does not.
    """
    if own.candidate.aggregator.looks_at_scores:
        return (
            f"{own.candidate.label} also looks at scores, which the log has in part: it is asked as if every "
            "objective had progressed alike, and its weights here are not those of the run"
        )
    difference = torch.from_numpy(own.weights - recording.weights)
    norms = recording.grams.diagonal(dim1=1, dim2=2).sqrt()
    effect = (recording.grams @ difference[:, :, None])[:, :, 0].abs() / torch.where(norms > 0, norms, 1.0)
    reach = (norms * torch.from_numpy(np.abs(own.weights) + np.abs(recording.weights))).sum(dim=1)
    apart = effect.amax(dim=1) / torch.where(reach > 0, reach, 1.0)
    # Not "apart > ...": a weight that the log has as null is NaN here.
    wrong = int((~(apart <= _AGREEMENT)).sum())
    if wrong == 0:
        return None
    step = int(apart.nan_to_num(nan=math.inf).argmax())
    objective = int((norms * difference.abs())[step].nan_to_num(nan=math.inf).argmax())
    return (
        f"at {wrong} of {len(recording.steps)} steps the logged weights are not those of "
        f"{own.candidate.label}; the largest difference: step {recording.steps[step]}, "
        f"{recording.names[objective]}, logged {recording.weights[step, objective]:.10g}, recomputed "
        f"{own.weights[step, objective]:.10g} (another version, or {CONFIG_FILE} was edited)"
    )
