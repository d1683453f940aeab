"""The demo's prompts and objectives."""

from __future__ import annotations

import collections
import itertools
import json

import pytest

from gapo_mega.data.tables import packaged
from gapo_mega.demo.rewards import concise, plain, words


def _prompts() -> list[dict[str, str]]:
    text = packaged("data.source", "package:prompts").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_have_both_splits_and_no_near_duplicates() -> None:
    rows = _prompts()
    count = collections.Counter(row["split"] for row in rows)
    assert set(count) == {"train", "heldout"}
    assert count["heldout"] >= 64 and count["train"] >= 256
    assert all(set(row) == {"prompt", "split"} for row in rows)
    assert all(4 <= len(row["prompt"].split()) <= 20 for row in rows)
    # Short words carry grammar: what two prompts share of the others tells whether they ask the same.
    contents = [frozenset(word for word in words(row["prompt"]) if len(word) > 3) for row in rows]
    for one, other in itertools.combinations(contents, 2):
        assert len(one & other) / max(1, len(one | other)) < 0.7, f"near duplicates: {one} {other}"


def test_unknown_data_file_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"data\.source: found 'package:nope', accepted: package:prompts"):
        packaged("data.source", "package:nope")


def _one(function: object, prompt: str, response: str) -> float:
    assert callable(function)
    (score,) = function([prompt], [response])
    assert 0.0 <= score <= 1.0
    return float(score)


SKY = "Why is the sky blue?"


# Written out by hand from the docstring: 5 to 10 words are full marks, then a line to 0 at 40 words.
@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("", 0.0),
        ("  \n", 0.0),
        ("Yes.", 0.2),
        ("The sky is blue today.", 1.0),
        ("The sky is blue today", 0.5),
        ("It said: “the sky is blue.”", 1.0),
        ("word " * 9 + "word.", 1.0),
        ("word " * 24 + "word.", 0.5),
        ("word " * 39 + "word.", 0.0),
        ("word " * 500 + "word.", 0.0),
        ("... !!! 12 345.", 0.0),
    ],
)
def test_concise(response: str, score: float) -> None:
    # The expected values are exact fractions; the tolerance covers one rounding of a division.
    assert _one(concise, SKY, response) == pytest.approx(score, rel=1e-12)


# Words of 3 letters are full marks, words of 7 none; five words at least.
@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("", 0.0),
        ("123 !!!", 0.0),
        ("The sky is one big sea.", 1.0),
        ("the the the the the the the", 1.0),
        ("word word word word word", 0.75),
        ("seventy seventy seventy seventy seventy", 0.0),
        ("internationally acknowledged considerations notwithstanding circumstances", 0.0),
        ("the sea", 0.4),
        ("The cats' sails are red now", 1 - 0.5 / 4),
    ],
)
def test_plain(response: str, score: float) -> None:
    assert _one(plain, SKY, response) == pytest.approx(score, rel=1e-12)


def test_the_objectives_pull_apart_and_still_have_a_common_optimum() -> None:
    dense = "Atmospheric molecules preferentially scatter shorter wavelengths."
    rambling = (
        "The sky is blue, as the air up in it can bend and send on " + "all of the " * 6 + "blue light."
    )
    both = "The air in the sky can send us blue."
    assert _one(concise, SKY, dense) > _one(concise, SKY, rambling)
    assert _one(plain, SKY, dense) < _one(plain, SKY, rambling)
    assert _one(concise, SKY, both) == 1.0
    assert _one(plain, SKY, both) > 0.9


def test_scores_come_one_per_pair_in_order() -> None:
    responses = ["", "The sky is blue, and the air is thin.", "No."]
    for function in (concise, plain):
        assert function([SKY] * 3, responses) == [function([SKY], [r])[0] for r in responses]
        with pytest.raises(ValueError, match="zip"):
            function([SKY] * 2, responses)
