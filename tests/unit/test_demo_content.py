"""The demo's prompts and objectives."""

from __future__ import annotations

import collections
import itertools
import json

import pytest

from gapo_mega import data
from gapo_mega.objectives_demo import concise, on_topic, topics


def _prompts() -> list[dict[str, str]]:
    text = data.path("prompts.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_prompts_have_both_splits_and_no_near_duplicates() -> None:
    rows = _prompts()
    count = collections.Counter(row["split"] for row in rows)
    assert set(count) == {"train", "heldout"}
    assert count["heldout"] >= 64 and count["train"] >= 256
    assert all(set(row) == {"prompt", "split"} for row in rows)
    assert all(4 <= len(row["prompt"].split()) <= 20 for row in rows)
    for one, other in itertools.combinations([topics(row["prompt"]) for row in rows], 2):
        assert len(one & other) / len(one | other) < 0.6, f"near duplicates: {one} {other}"


def test_every_prompt_can_be_scored() -> None:
    assert all(topics(row["prompt"]) for row in _prompts())


def test_unknown_data_file_names_what_there_is() -> None:
    with pytest.raises(ValueError, match=r"found 'nope\.jsonl', accepted: .*prompts\.jsonl"):
        data.path("nope.jsonl")


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


# Topics of the question: sky, blue. Each other content word counts a quarter, up to four.
@pytest.mark.parametrize(
    ("response", "score"),
    [
        ("", 0.0),
        ("Why is the sky blue?", 0.0),
        ("Sky blue sky blue sky blue.", 0.0),
        ("Air molecules scatter sunlight.", 0.0),
        ("Molecules scatter sunlight in the sky.", 0.5 * 3 / 4),
        ("The sky is blue because air molecules scatter sunlight.", 1.0),
        ("The sky is blue because air molecules scatter sunlight more than red or green light.", 1.0),
        ("Blue skies: scattering.", 1 / 4),
    ],
)
def test_on_topic(response: str, score: float) -> None:
    assert _one(on_topic, SKY, response) == pytest.approx(score, rel=1e-12)


def test_the_objectives_pull_apart_and_still_have_a_common_optimum() -> None:
    rambling = "The sky is blue because " + "air molecules scatter sunlight and so on and " * 5 + "more."
    curt = "Because of sunlight and air."
    both = "The sky is blue because air molecules scatter sunlight."
    assert _one(concise, SKY, curt) > _one(concise, SKY, rambling)
    assert _one(on_topic, SKY, curt) < _one(on_topic, SKY, rambling)
    assert _one(concise, SKY, both) == _one(on_topic, SKY, both) == 1.0


def test_scores_come_one_per_pair_in_order() -> None:
    responses = ["", "The sky is blue because air molecules scatter sunlight.", "No."]
    for function in (concise, on_topic):
        assert function([SKY] * 3, responses) == [function([SKY], [r])[0] for r in responses]
        with pytest.raises(ValueError, match="zip"):
            function([SKY] * 2, responses)


def test_on_topic_names_a_prompt_without_topics() -> None:
    with pytest.raises(ValueError, match="found the prompt 'Who are you\\?'"):
        on_topic(["Who are you?"], ["A language model."])
