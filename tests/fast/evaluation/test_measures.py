"""What a supervised run reports, against numbers worked out by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy.special import expit

from gapo_mega.evaluation import measures

# Margins 2, -1, 0 and 3; the lengths of the first and the third pair are within a tenth.
SCORES = [(3.0, 1.0), (0.5, 1.5), (2.0, 2.0), (-1.0, -4.0)]
LENGTHS = [(20, 19), (30, 10), (7, 7), (10, 40)]


def test_measures_of_pairs() -> None:
    found = measures.of_pairs(SCORES, LENGTHS)
    share = 2.5 / 4  # the tie is half right
    assert found == pytest.approx(
        {
            "pairs": 4,
            "accuracy": share,
            "standard_error": math.sqrt(share * (1 - share) / 4),
            "loss": sum(-math.log(expit(margin)) for margin in (2, -1, 0, 3)) / 4,
            "margin": 1.0,
            "length_baseline": 2 / 3,  # the longer one is chosen in two of the three pairs of unequal length
            "matched_pairs": 2,
            "matched_accuracy": 0.75,
            "matched_standard_error": math.sqrt(0.75 * 0.25 / 2),
        },
        rel=1e-12,
    )


def test_the_baseline_is_the_better_rule() -> None:
    lengths = [(1, 9), (2, 9), (9, 1)]
    assert measures.of_pairs(SCORES[:3], lengths)["length_baseline"] == pytest.approx(2 / 3)


def test_what_cannot_be_measured_is_left_out() -> None:
    found = measures.of_pairs([(1.0, 0.0)], [(5, 50)])
    assert "matched_accuracy" not in found and found["length_baseline"] == 1.0
    assert "length_baseline" not in measures.of_pairs([(1.0, 0.0)], [(5, 5)])


def test_large_margins_do_not_overflow() -> None:
    assert measures.of_pairs([(-900.0, 900.0)], [(1, 1)])["loss"] == 1800.0


def test_measures_of_chats() -> None:
    found = measures.of_chats([-6.0, -2.0], [3, 1])
    assert found == pytest.approx({"chats": 2, "tokens": 4, "loss": 2.0, "perplexity": math.exp(2)})


def test_what_lengths_give_away() -> None:
    lengths = [(3, 2), (2, 3), (9, 1), (5, 5), (10, 9), (100, 89)]
    assert measures.longer_wins(lengths) == 4 / 5
    assert measures.longer_wins([(5, 5)]) is None
    assert measures.length_matched("abcdef", lengths) == ["d", "e"]
    assert measures.length_matched("abcdef", lengths, tolerance=0.11) == ["d", "e", "f"]
    drawn = np.random.default_rng(0).integers(1, 300, (500, 2))
    as_pairs = [(int(chosen), int(rejected)) for chosen, rejected in drawn]
    close = np.abs(drawn[:, 0] - drawn[:, 1]) / drawn.max(1) <= 0.1
    assert measures.length_matched(range(500), as_pairs) == np.flatnonzero(close).tolist()
    unequal = drawn[drawn[:, 0] != drawn[:, 1]]
    assert measures.longer_wins(as_pairs) == (unequal.argmax(1) == 0).mean()


@pytest.mark.parametrize("scores", [[(1.0, 0.0)], [(1.0, 0.0)] * 3, [(0.0, 1.0)] * 50])
def test_a_share_that_never_varied_has_no_standard_error(scores: list[tuple[float, float]]) -> None:
    found = measures.of_pairs(scores, [(5, 5)] * len(scores))
    assert found["accuracy"] in (0.0, 1.0) and found["matched_accuracy"] == found["accuracy"]
    assert "standard_error" not in found and "matched_standard_error" not in found


def test_a_perplexity_beyond_double_precision_is_left_out() -> None:
    found = measures.of_chats([-2000.0], [2])
    assert found["loss"] == 1000.0 and "perplexity" not in found
