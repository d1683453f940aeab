"""Numbers of verdicts, by hand."""

from __future__ import annotations

import pytest

from gapo_mega.evaluation.intervals import Estimate, Resampling
from gapo_mega.evaluation.judged import Judgement, judged

HOW = Resampling(resamples=200)


def test_a_win_needs_both_orders() -> None:
    found = judged(
        "kind",
        "new",
        "old",
        [
            Judgement("model", "model"),
            Judgement("model", "against"),  # each time the one that came first
            Judgement("against", "against"),
            Judgement("model", "neither"),
            Judgement("neither", "neither", asked=False),
            Judgement("against", None),
        ],
        HOW,
    )
    assert found.share.mean == pytest.approx((1 + 0.5 + 0 + 0.75 + 0.5 + 0.25) / 6)
    assert (found.wins, found.losses) == (pytest.approx(1 / 6), pytest.approx(1 / 6))
    assert found.ties == pytest.approx(4 / 6)
    assert found.consistent == pytest.approx(2 / 5)
    # Of the eight verdicts for one of the two, prompt by prompt: yes no, yes yes, no yes, yes, no.
    assert found.first == pytest.approx(5 / 8)
    assert (found.silent, found.prompts) == (1, 6)


def test_a_judge_that_always_takes_the_first_is_seen() -> None:
    found = judged("kind", "new", "old", [Judgement("model", "against")] * 3, HOW)
    assert (found.first, found.consistent, found.share) == (1.0, 0.0, Estimate(0.5, None, None))


def test_equal_texts_are_ties_that_nobody_was_asked_about() -> None:
    found = judged("kind", "new", "old", [Judgement("neither", "neither", asked=False)] * 2, HOW)
    assert (found.ties, found.consistent, found.first, found.silent) == (1.0, None, None, 0)
