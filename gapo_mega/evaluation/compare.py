"""Runs side by side: means over seeds, paired tests against one of them, what they cost.

Runs that differ in nothing but the seed are one group. A group's name is its method, with the options and
settings in which the runs at hand differ.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, TypeAlias

import numpy as np
from scipy import stats

from gapo_mega.config import Config
from gapo_mega.config.results import without_effect
from gapo_mega.evaluation.finished_run import FinishedRun, known
from gapo_mega.evaluation.heldout_answers import scores_by_prompt
from gapo_mega.evaluation.series import Array
from gapo_mega.evaluation.summary import CONFIDENCE
from gapo_mega.planning.preference import method_of

# What tells nothing about a run's numbers, or has a place of its own in the table.
_LEFT_OUT = ("output_dir", "seed")
# Scores are float32: differences that spread by less than a few of its units are all the same.
_ROUNDING = 4 * float(np.finfo(np.float32).eps)
_LONGEST = 40  # characters of a value in a label
_OF_METHODS = (
    "aggregation.name",
    "aggregation.options",
    "scalarization",
)
# The scores after training by prompt, of the run with a seed; None where nobody kept them.
_ScoresOf: TypeAlias = Callable[[int], Mapping[str, tuple[float, ...]] | None]


@dataclass(frozen=True)
class Group:
    """Runs of one method with one set of settings."""

    label: str
    method: str
    runs: dict[int, FinishedRun]  # by seed

    def values(self, measure: str, names: Sequence[str]) -> Array:
        """``after`` or ``gain`` of every seed and objective [S, M]."""
        found = [
            [getattr(run.summary[n], "after" if measure == "after" else "difference") for n in names]
            for run in self.runs.values()
        ]
        return np.array(found, dtype=float)


def groups_of(runs: Sequence[FinishedRun]) -> list[Group]:
    """The runs by what they have in common beside the seed, in the order of their first ones.

    Raises ``ValueError`` where two are alike, seed included.
    """
    settings = [_flat(run.config) for run in runs]
    keys = dict.fromkeys(key for found in settings for key in found)
    differing = [key for key in keys if len({_json(found.get(key)) for found in settings}) > 1]
    methods = [method_of(run.config) for run in runs]
    groups: dict[str, Group] = {}
    for run, found, (name, options) in zip(runs, settings, methods, strict=True):
        same = [other for own, other in methods if own == name]
        kept = {
            key: options.get(key)
            for key in dict.fromkeys(key for other in same for key in other)
            if len({_json(other.get(key)) for other in same}) > 1
        }
        method = name.rpartition(":")[2]
        shown = ", ".join(f"{key}={_text(value)}" for key, value in kept.items() if value is not None)
        parts = [f"{method}({shown})" if shown else method]
        label = " ".join([*parts, *(f"{key}={_text(found.get(key))}" for key in differing)])
        exact = _json([name, kept, {key: found.get(key) for key in differing}])
        if exact not in groups:
            alike = sum(group.label.partition(" (")[0] == label for group in groups.values())
            groups[exact] = Group(f"{label} ({alike + 1})" if alike else label, method, {})
        group = groups[exact]
        if run.config.seed in group.runs:
            raise ValueError(
                f"run directory: found {group.runs[run.config.seed].directory} and {run.directory}, alike in "
                "all settings and the seed; accepted: one of them"
            )
        group.runs[run.config.seed] = run
    return list(groups.values())


def common_objectives(runs: Sequence[FinishedRun]) -> list[str]:
    """The objectives that all runs have, in the first one's order. Raises ``ValueError`` without any."""
    names = [name for name in runs[0].names if all(name in run.names for run in runs)]
    if not names:
        raise ValueError(
            f"run directory: found no objective that all {len(runs)} have, accepted: runs with one in common"
        )
    return names


def compare(runs: Sequence[FinishedRun], baseline: str | None = None) -> dict[str, Any]:
    """Groups, tests against the baseline's group, and runs, as JSON.

    ``tests``: for every group and objective the difference of the held-out means after training from the
    baseline's, by the paired t test: over the seeds that both have, and over the held-out prompts that both
    answered, whose scores are first averaged over these seeds. The one says whether another seed would show
    the same, the other whether other prompts would. p values are not corrected for the number of tests.

    Args:
        runs: at least one.
        baseline: a group's label or method; None: the first group.

    Raises ``ValueError`` for a baseline that is none of them, and as ``groups_of`` does.
    """
    groups, names = groups_of(runs), common_objectives(runs)
    base = _baseline(groups, baseline)
    # Read once, however many groups are compared with them.
    scores_of_base = cache(lambda seed: scores_by_prompt(base.runs[seed].directory, names))
    return {
        "objectives": names,
        "baseline": base.label,
        "groups": [_as_dict(group, names) for group in groups],
        "tests": [
            test
            for group in groups
            if group is not base
            for test in _tests(group, base, names, scores_of_base)
        ],
        "runs": [
            {
                "group": group.label,
                "method": group.method,
                "seed": seed,
                "directory": str(run.directory),
                **run.as_dict(),
            }
            for group in groups
            for seed, run in group.runs.items()
        ],
    }


def mean_and_error(values: Array) -> dict[str, float | None]:
    """Mean, and its standard error over seeds: std(ddof 1) / sqrt(S); null for one seed."""
    error = float(np.std(values, ddof=1)) / math.sqrt(len(values)) if len(values) > 1 else math.nan
    return {"mean": known(float(np.mean(values))), "standard_error": known(error)}


def paired_test(differences: Array) -> dict[str, Any] | None:
    """Student's paired t test of ``differences`` [n]; None for fewer than two.

    ``p`` and the interval are null where all differ by the same.
    """
    count = len(differences)
    if count < 2:
        return None
    found: dict[str, Any] = {
        "n": count,
        "difference": known(float(differences.mean())),
        "p": None,
        "interval": None,
    }
    if np.ptp(differences) > _ROUNDING * np.abs(differences).max():
        tested = stats.ttest_1samp(differences, 0.0)
        interval = tested.confidence_interval(CONFIDENCE)
        found |= {"p": known(float(tested.pvalue)), "interval": [float(interval.low), float(interval.high)]}
    return found


def _as_dict(group: Group, names: Sequence[str]) -> dict[str, Any]:
    runs = list(group.runs.values())

    def measured(numbers: Sequence[float]) -> dict[str, float | None]:
        finite = np.array([number for number in numbers if math.isfinite(number)])
        return mean_and_error(finite) if len(finite) else {"mean": None, "standard_error": None}

    return {
        "label": group.label,
        "method": group.method,
        "seeds": sorted(group.runs),
        "of_steps": sorted({run.standing.step for run in runs}),
        "after": {
            n: mean_and_error(column) for n, column in zip(names, group.values("after", names).T, strict=True)
        },
        "gain": {
            n: mean_and_error(column) for n, column in zip(names, group.values("gain", names).T, strict=True)
        },
        "kl": measured([run.kl for run in runs]),
        "response_length": measured([run.response_length for run in runs]),
        **{
            key: measured([float(getattr(run.cost, key)) for run in runs])
            for key in ("samples", "reward_calls", "backwards", "updates", "seconds")
        },
    }


def _tests(
    group: Group, base: Group, names: Sequence[str], scores_of_base: _ScoresOf
) -> list[dict[str, Any]]:
    seeds = [seed for seed in group.runs if seed in base.runs]
    by_seed = np.array(
        [np.subtract(group.runs[s].after(names), base.runs[s].after(names)) for s in seeds]
    ).reshape(len(seeds), len(names))
    by_prompt = _over_prompts(group, scores_of_base, seeds, names)
    return [
        {
            "group": group.label,
            "baseline": base.label,
            "objective": name,
            "over_seeds": paired_test(by_seed[:, index]),
            "over_prompts": None if by_prompt is None else paired_test(by_prompt[:, index]),
        }
        for index, name in enumerate(names)
    ]


def _over_prompts(
    group: Group, scores_of_base: _ScoresOf, seeds: Sequence[int], names: Sequence[str]
) -> Array | None:
    """A row of differences for every prompt that both answered with one of the seeds; None without any."""
    found: dict[str, list[Array]] = {}
    for seed in seeds:
        ours = scores_by_prompt(group.runs[seed].directory, names)
        theirs = scores_of_base(seed)
        for prompt, scores in ({} if ours is None or theirs is None else ours).items():
            if theirs is not None and prompt in theirs:
                found.setdefault(prompt, []).append(np.subtract(scores, theirs[prompt]))
    return np.array([np.mean(rows, axis=0) for rows in found.values()]) if found else None


def _baseline(groups: Sequence[Group], wanted: str | None) -> Group:
    if wanted is None:
        return groups[0]
    matching = [g for g in groups if g.label == wanted] or [g for g in groups if g.method == wanted]
    if len(matching) != 1:
        labels = ", ".join(group.label for group in groups)
        raise ValueError(f"--baseline: found {wanted!r}, accepted: one of {labels}")
    return matching[0]


def _flat(config: Config) -> dict[str, Any]:
    """Every setting by its dotted name, without what names the method and what changes no number."""
    found: dict[str, Any] = {}
    left_out = (*_LEFT_OUT, *_OF_METHODS, *without_effect(config.checkpoint.best))

    def put(value: Any, key: str) -> None:
        if isinstance(value, dict) and value:
            for name, inner in value.items():
                put(inner, f"{key}.{name}" if key else name)
        elif not key.startswith(left_out):
            found[key] = value

    put(config.model_dump(mode="json"), "")
    return found


def _json(value: object) -> str:
    return json.dumps(value, sort_keys=True, default=str)


def _text(value: object) -> str:
    if isinstance(value, list) and all(isinstance(item, int | float) for item in value):
        return "/".join(f"{item:g}" for item in value)
    if isinstance(value, list) and all(isinstance(item, dict) and "name" in item for item in value):
        return "/".join(str(item["name"]) for item in value)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return text if len(text) <= _LONGEST else f"...{text[-_LONGEST:]}"  # of paths the end says more
