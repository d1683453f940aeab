"""A judge behind a real socket."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from pydantic import ValidationError

from gapo_mega.objectives.pairwise import PairwiseJudge, PairwiseOptions, verdict_of
from tests.helpers.http_services import Answer, Service, services

Start = Callable[[Callable[[int, dict[str, Any]], Answer]], Service]
RUBRICS = {"kind": "the {friendlier} one is better."}


@pytest.fixture
def start() -> Iterator[Start]:
    with services() as begin:
        yield begin


def says(words: object) -> Answer:
    return 200, json.dumps({"choices": [{"message": {"role": "assistant", "content": words}}]}).encode(), {}


def judge(service: Service, **changes: Any) -> PairwiseJudge:
    base = service.url.removesuffix("/score") + "/v1/"
    settings = {"url": base, "model": "m", "rubrics": RUBRICS, "backoff": 0.01, "retries": 2, **changes}
    return PairwiseJudge(PairwiseOptions.model_validate(settings), "--judge j.yaml")


def ask(asked: PairwiseJudge) -> str:
    conversation = [{"role": "user", "content": "Hi {x}?"}]
    return asked.ask(asked.request("kind", conversation, "yes {0}", "no"))


def test_it_posts_a_chat_completion(start: Start, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("JUDGE_KEY", "Bearer secret-key")
    service = start(lambda number, content: says("Fine. [[A]]"))
    assert ask(judge(service, headers={"Authorization": "env:JUDGE_KEY"})) == "Fine. [[A]]"
    assert service.paths == ["/v1/chat/completions"]
    assert service.headers[0]["Authorization"] == "Bearer secret-key"
    (content,) = service.requests
    assert (content["model"], content["temperature"], content["max_tokens"]) == ("m", 0.0, 512)
    system, user = content["messages"]
    assert (system["role"], user["role"]) == ("system", "user")
    assert RUBRICS["kind"] in system["content"]
    text = user["content"]
    assert 0 < text.index("user: Hi {x}?") < text.index("yes {0}") < text.index("[Response B]\nno")


def test_what_passes_is_asked_again(start: Start) -> None:
    service = start(lambda number, content: says("[[C]]") if number else (503, b"busy", {}))
    assert ask(judge(service)) == "[[C]]"
    assert len(service.requests) == 2


@pytest.mark.parametrize(
    ("answer", "message"),
    [
        (
            (404, b"no such model", {}),
            r"found, after 1 attempt, status 404 and 'no such model'; ",
        ),
        (
            (200, b"{}", {}),
            r"found, after 1 attempt, no text of a choice in '\{\}'; accepted: status",
        ),
        (says(None), r"no text of a choice in "),
        ((200, b'{"choices": []}', {}), r"no text of a choice in "),
        ((500, b"", {}), r"found, after 3 attempts, status 500"),
    ],
)
def test_other_answers_are_one_line(start: Start, answer: Answer, message: str) -> None:
    service = start(lambda number, content: answer)
    with pytest.raises(ValueError, match=message) as error:
        ask(judge(service))
    assert str(error.value).startswith("--judge j.yaml: http://127.0.0.1:")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("words", "verdict"),
    [
        ("[[A]]", "first"),
        ("[[A]] or rather\n[[B]].", "second"),
        ("**[[C]]**", "neither"),
        ("A is better", None),
        ("[[D]] [A]", None),
        ("", None),
    ],
)
def test_the_last_verdict_counts(words: str, verdict: str | None) -> None:
    assert verdict_of(words) == verdict


@pytest.mark.parametrize(
    "changes", [{"rubrics": {}}, {"rubrics": {"a b": "x"}}, {"rubrics": {"a": ""}}, {"model": ""}]
)
def test_a_judge_without_a_rubric_or_model_is_refused(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        PairwiseOptions.model_validate({"url": "http://h/v1", "model": "m", "rubrics": RUBRICS, **changes})
