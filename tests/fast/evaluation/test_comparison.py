"""Measures of made-up responses, by hand."""

from __future__ import annotations

from dataclasses import astuple, replace

import numpy as np
import pytest

from gapo_mega.evaluation.comparison import Asked, compare, distinct, measures_of
from gapo_mega.evaluation.intervals import Resampling, estimates
from tests.helpers.answers import answers

HOW = Resampling(resamples=300, seed=3)


def asked(**changes: object) -> Asked:
    return replace(Asked(["kind", "short"], 2, {"kind": 1.0}, ("mine", ["no"])), **changes)  # type: ignore[arg-type]


def test_measures_are_means_over_the_samples_of_a_prompt() -> None:
    given = answers([0.0, 2.0, 1.0, 4.0], samples=2, short=3.0)
    given[3] = replace(given[3], response="No, never")
    found = {key: values_P.tolist() for key, values_P in measures_of(given, asked()).items()}
    assert found == {
        "objective/kind": [1.0, 2.5],
        "objective/short": [3.0, 3.0],
        "average": [2.0, 2.75],
        "above/kind": [0.5, 0.5],  # a score of exactly 1 is not above 1
        "kl": [0.25, 1.25],
        "tokens": [1.5, 3.5],
        "finished": [0.5, 0.5],
        "refusals": [0.0, 0.5],
    }


def test_one_objective_has_no_average_and_an_unmeasured_kl_no_row() -> None:
    given = [replace(answer, kl=None) for answer in answers([0.0, 2.0], samples=2)]
    found = measures_of(given, asked(objectives=["kind"]))
    assert "average" not in found and "kl" not in found


def test_distinct_n_counts_different_n_grams_over_all_responses() -> None:
    responses = ["a b a b", "a b", "", "c"]
    assert distinct(responses, 1) == 3 / 7
    assert distinct(responses, 2) == 2 / 4  # ab ba ab | ab
    assert distinct(responses, 5) is None


def test_differences_are_paired() -> None:
    """A spread between prompts that both models share does not widen the interval of their difference."""
    easy = np.random.default_rng(0).normal(size=40) * 10
    better = easy + 0.1 + 0.01 * np.arange(40) / 40
    by_name = {"base": answers(easy.tolist()), "new": answers(better.tolist())}
    comparison = compare(by_name, asked(objectives=["kind"], samples=1), HOW)
    (found,) = [d for d in comparison.of("new", "base") if d.measure == "objective/kind"]
    (alone,) = estimates((better - easy)[None], HOW)
    # The order of a sum depends on how many rows there are.
    assert astuple(found.estimate) == pytest.approx(astuple(alone), rel=1e-12)
    assert found.finding == "higher"
    assert (found.higher, found.equal, found.lower) == (1.0, 0.0, 0.0)
    base, new = (model.estimates["objective/kind"] for model in comparison.models)
    assert base.high is not None and new.low is not None and new.low < base.high  # apart, they overlap
    assert [d.finding for d in comparison.of("new", "base") if d.measure == "tokens"] == ["equal"]


@pytest.mark.parametrize(
    ("shift", "prompts", "finding"),
    [(-1.0, 40, "lower"), (0.0, 40, "unclear"), (1.0, 9, "too few prompts"), (1.0, 10, "higher")],
)
def test_findings(shift: float, prompts: int, finding: str) -> None:
    noise = np.resize([0.5, -0.5], prompts)
    by_name = {"a": answers([0.0] * prompts), "b": answers((noise + shift).tolist())}
    comparison = compare(by_name, asked(objectives=["kind"], samples=1), HOW)
    assert comparison.of("b", "a")[0].finding == finding


def test_a_difference_without_a_spread_is_no_finding() -> None:
    by_name = {"a": answers([0.0] * 12), "b": answers([1.0] * 12)}
    comparison = compare(by_name, asked(objectives=["kind"], samples=1), HOW)
    assert comparison.of("b", "a")[0].finding == "same on every prompt"


def test_every_pair_is_compared() -> None:
    by_name = {name: answers([1.0, 2.0]) for name in "abc"}
    comparison = compare(by_name, asked(objectives=["kind"], samples=1), HOW)
    pairs = [(d.model, d.against) for d in comparison.differences if d.measure == "kl"]
    assert pairs == [("b", "a"), ("c", "a"), ("c", "b")]
    assert list(comparison.measures.values())[:2] == ["kind", "kind > 1 (share)"]
