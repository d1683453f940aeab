"""Pairs of responses before a judge with a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.evaluation.answers import Answer as Response
from gapo_mega.evaluation.intervals import Resampling
from gapo_mega.evaluation.judged import Judged
from gapo_mega.objectives.pairwise import PairwiseOptions
from gapo_mega.runs.judging import JUDGEMENTS_FILE, Judging
from gapo_mega.types import Prompt
from tests.helpers.answers import answers
from tests.helpers.http_services import Answer, Service, services

Start = Callable[[Callable[[int, dict[str, Any]], Answer]], Service]
PROMPTS = [Prompt(i, f"question {i}") for i in range(4)]
RUBRICS = {"long": "the longer one", "short": "the shorter one"}


@pytest.fixture
def start() -> Iterator[Start]:
    with services() as begin:
        yield begin


def longer(number: int, content: dict[str, Any]) -> Answer:
    """Compares lengths, as the rubric asks."""
    system, user = (message["content"] for message in content["messages"])
    first = user.split("[Response A]\n")[1].split("\n[End of response A]")[0]
    second = user.split("[Response B]\n")[1].split("\n[End of response B]")[0]
    sign = 1 if RUBRICS["long"] in system else -1
    difference = sign * (len(first) - len(second))
    verdict = "A" if difference > 0 else "B" if difference < 0 else "C"
    return 200, json.dumps({"choices": [{"message": {"content": f"So: [[{verdict}]]"}}]}).encode(), {}


def responses(*texts: str) -> list[Response]:
    return [replace(each, response=text) for each, text in zip(answers([0.0] * 4), texts, strict=True)]


BY_NAME = {"base": responses("aa", "same", "bb", "cc"), "new": responses("aaa", "same", "b", "dd")}


def judge(service: Service, folder: Path, by_name: dict[str, list[Response]] | None = None) -> list[Judged]:
    url = service.url.removesuffix("/score")
    options = PairwiseOptions.model_validate(
        {"url": url, "model": "m", "rubrics": RUBRICS, "retries": 0, "concurrency": 3}
    )
    judging = Judging(options, "--judge", folder / JUDGEMENTS_FILE)
    return judging.judge(PROMPTS, by_name or BY_NAME, 1, Resampling(resamples=100))


def test_every_pair_is_seen_in_both_orders(start: Start, tmp_path: Path) -> None:
    service = start(longer)
    by_rubric = {each.rubric: each for each in judge(service, tmp_path)}
    assert (by_rubric["long"].model, by_rubric["long"].against) == ("new", "base")
    for found in by_rubric.values():
        assert (found.wins, found.ties, found.losses, found.consistent) == (0.25, 0.5, 0.25, 1.0)
        assert (found.first, found.silent, found.share.mean) == (0.5, 0, 0.5)
    assert len(service.requests) == 3 * 2 * 2  # nobody is asked about "same"
    longest = [r for r in service.requests if "question 0" in r["messages"][1]["content"]]
    orders = {
        r["messages"][1]["content"].index("aaa\n") < r["messages"][1]["content"].index("aa\n[")
        for r in longest
    }
    assert orders == {True, False}


def test_what_was_said_is_not_asked_again(start: Start, tmp_path: Path) -> None:
    service = start(longer)
    first = judge(service, tmp_path)
    path = tmp_path / JUDGEMENTS_FILE
    path.write_bytes(path.read_bytes()[:-5])  # killed while it wrote
    assert judge(service, tmp_path) == first
    assert len(service.requests) == 13
    assert [json.loads(line)["said"][:3] for line in path.read_text().splitlines()] == ["So:"] * 12
    changed = {**BY_NAME, "new": responses("aaaa", "same", "b", "dd")}
    judge(service, tmp_path, changed)
    assert len(service.requests) == 17  # of one prompt: two orders, two rubrics


def test_an_endpoint_that_fails_leaves_what_it_said(start: Start, tmp_path: Path) -> None:
    broken = start(lambda number, content: longer(number, content) if number < 5 else (500, b"", {}))
    with pytest.raises(ValueError, match=r"^--judge: http://.*/chat/completions: found, after 1 attempt"):
        judge(broken, tmp_path)
    assert len((tmp_path / JUDGEMENTS_FILE).read_text().splitlines()) == 5


def test_a_line_of_something_else_is_named(start: Start, tmp_path: Path) -> None:
    (tmp_path / JUDGEMENTS_FILE).write_text("{}\n")
    with pytest.raises(ValueError, match=r"judgements.jsonl, line 1: found no judgement"):
        judge(start(longer), tmp_path)
