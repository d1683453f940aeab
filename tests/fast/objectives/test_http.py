"""Rewards over HTTP: real sockets, and services that fail."""

from __future__ import annotations

import re
import threading
from collections.abc import Iterator
from datetime import date
from pathlib import Path
from typing import Any

import pytest
import yaml

from gapo_mega.commands import reward_server
from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import build
from gapo_mega.objectives.hf_classifier import HfClassifierOptions
from gapo_mega.objectives.http import HttpOptions
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt
from tests.helpers.http_services import (
    EXPECTED,
    PROMPTS,
    RESPONSES,
    Answer,
    in_chunks,
    objective,
    right,
    services,
)


@pytest.fixture
def service() -> Iterator[Any]:
    with services() as start:
        yield start


def test_whole_conversations_are_sent_and_read_back(service: Any) -> None:
    asked = (
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "Yes?"},
        {"role": "user", "content": "naïve 東京"},
    )
    state = service(lambda number, content: (200, b'{"scores": [1, 2.5]}', {}))
    prompts = [Prompt(0, "naïve 東京", messages=asked), Prompt(1, "Hi")]
    assert objective(state.url).score(prompts, ["🌧️", "b"]) == [1.0, 2.5]
    (request,) = state.requests
    assert request == {
        "samples": [
            {
                "messages": [*asked, {"role": "assistant", "content": "🌧️"}],
                "prompt": "naïve 東京",
                "response": "🌧️",
            },
            {
                "messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "b"}],
                "prompt": "Hi",
                "response": "b",
            },
        ]
    }
    samples = reward_server.ScoreRequest.model_validate(request).samples
    for prompt, sample in zip(prompts, samples, strict=True):
        assert sample.as_prompt(0).answered(sample.response) == prompt.answered(sample.response)


def test_nothing_is_sent_when_built_and_as_many_at_once_as_allowed(service: Any) -> None:
    together = threading.Barrier(3)

    def answer(number: int, content: dict[str, Any]) -> Answer:
        together.wait(timeout=20)  # three requests have to be under way for one of them to be answered
        return right(content)

    state = service(answer)
    scored = objective(state.url, batch_size=5, concurrency=3)
    assert state.requests == []
    assert scored.score(PROMPTS[:30], RESPONSES[:30]) == EXPECTED[:30]
    assert sorted(len(request["samples"]) for request in state.requests) == [5] * 6


def test_an_answer_in_chunks_is_read_whole_or_asked_for_again(service: Any) -> None:
    """Without a length only the last chunk, which is empty, says where it ends."""

    def answer(number: int, content: dict[str, Any]) -> Answer:
        body = in_chunks(right(content)[1])
        return 200, body if number else body[:-5], {"Transfer-Encoding": "chunked"}

    state = service(answer)
    assert objective(state.url, retries=1).score(PROMPTS[:20], RESPONSES[:20]) == EXPECTED[:20]
    assert len(state.requests) == 2


@pytest.mark.parametrize("status", [503, 500, 429])
def test_passing_failures_are_retried(service: Any, status: int) -> None:
    state = service(lambda number, content: (status, b"busy", {}) if number < 2 else right(content))
    assert objective(state.url, retries=2).score(PROMPTS, RESPONSES) == pytest.approx(EXPECTED)
    assert len(state.requests) == 2 + 2  # two batches of at most 32


def test_retry_after_is_respected(service: Any) -> None:
    state = service(
        lambda number, content: (503, b"", {"Retry-After": "1"}) if number == 0 else right(content)
    )
    assert objective(state.url, backoff=0.0).score(PROMPTS[:2], RESPONSES[:2]) == EXPECTED[:2]
    assert state.times[1] - state.times[0] >= 0.99


@pytest.mark.parametrize(
    ("answer", "found", "asked"),
    [
        ((503, b"over\nloaded", {}), r"after 3 attempts, status 503 and 'over loaded'", 3),
        ((404, b"no such page", {}), r"after 1 attempt, status 404 and 'no such page'", 1),
        ((302, b"", {"Location": "/elsewhere"}), r"after 1 attempt, status 302", 1),
        ((200, b"<html>hello" + b"o" * 999, {}), r"what is not JSON: '<html>hello.*\.\.\.'", 1),
        ((200, b'{"rewards": [1, 2]}', {}), r"no list of scores in '{\"rewards\"", 1),
        ((200, b"[1, 2]", {}), r"no list of scores in '\[1, 2\]'", 1),
        ((200, b'{"scores": [1]}', {}), r"1 scores in '{\"scores\"", 1),
    ],
)
def test_answers_that_are_none(service: Any, answer: Answer, found: str, asked: int) -> None:
    state = service(lambda number, content: answer)
    with pytest.raises(ValueError, match=found) as raised:
        objective(state.url, retries=2).score(PROMPTS[:2], RESPONSES[:2])
    message = str(raised.value)
    assert message.startswith(f"objective 'helpful': {state.url}: found, after ")
    assert message.endswith('accepted: status 200 with {"scores": [...]}, 2 numbers')
    assert "\n" not in message and len(message) < 500
    assert len(state.requests) == asked


@pytest.mark.parametrize("score", [b'"1.0"', b"null", b"NaN", b"[1]"])
def test_scores_that_are_no_numbers_are_refused_by_index(service: Any, score: bytes) -> None:
    state = service(lambda number, content: (200, b'{"scores": [1, %s]}' % score, {}))
    with pytest.raises(ValueError, match=r"objective 'helpful': found the score .* for response 1, accepted"):
        objective(state.url).score(PROMPTS[:2], RESPONSES[:2])


@pytest.mark.parametrize(
    ("score", "shown"),
    [
        (b"true", "true"),
        (b"false", "false"),
        (b"1" + b"0" * 400, "1000"),
        (b"1e999", "inf"),
        (b"-Infinity", "-inf"),
    ],
)
def test_scores_that_python_would_take_for_numbers_are_refused(
    service: Any, score: bytes, shown: str
) -> None:
    """By their place among all responses, not in their request."""
    answers = {"1": b"1.0", "3": score}

    def answer(number: int, content: dict[str, Any]) -> Answer:
        scores = b", ".join(answers.get(sample["response"], b"0") for sample in content["samples"])
        return 200, b'{"scores": [%s]}' % scores, {}

    state = service(answer)
    message = rf"^objective 'helpful': found the score {shown}.* for response 3, accepted: a finite number$"
    with pytest.raises(ValueError, match=message) as raised:
        objective(state.url, batch_size=2, concurrency=1).score(PROMPTS[:5], RESPONSES[:5])
    assert len(str(raised.value)) < 400


@pytest.mark.parametrize(
    "body", [b'{"scores": [1, 2]', b"\xff\xfe", b"[" * 100_000, b'{"scores": [%s]}' % (b"1" * 5000)]
)
def test_answers_that_are_no_json_are_one_line(service: Any, body: bytes) -> None:
    state = service(lambda number, content: (200, body, {}))
    with pytest.raises(ValueError, match=r"after 1 attempt, what is not JSON: ") as raised:
        objective(state.url).score(PROMPTS[:2], RESPONSES[:2])
    assert "\n" not in str(raised.value) and len(str(raised.value)) < 500


@pytest.mark.parametrize(
    ("prompt", "response", "message"),
    [
        (
            Prompt(0, "a"),
            "x\udc80y",
            r"found '\\udc80' at character 1 of the response 1, accepted: text without",
        ),
        (Prompt(0, "\ud800"), "x", r"found '\\ud800' at character 0 of the prompt of response 1"),
        (
            Prompt(
                0, "a", messages=({"role": "user", "content": "ab\udfff"}, {"role": "user", "content": "a"})
            ),
            "x",
            r"found '\\udfff' at character 2 of the prompt of response 1",
        ),
    ],
)
def test_lone_surrogates_are_refused_before_anything_is_sent(
    service: Any, prompt: Prompt, response: str, message: str
) -> None:
    state = service(lambda number, content: right(content))
    with pytest.raises(ValueError, match=rf"^objective 'helpful': {message}"):
        objective(state.url).score([PROMPTS[0], prompt], [RESPONSES[0], response])
    assert state.requests == []


def test_a_slow_answer_is_a_failed_attempt(service: Any) -> None:
    stop = threading.Event()

    def answer(number: int, content: dict[str, Any]) -> Answer:
        if number == 0:
            stop.wait(30)
        return right(content)

    state = service(answer)
    scored = objective(state.url, timeout=0.5, retries=1)
    assert scored.score(PROMPTS[:2], RESPONSES[:2]) == EXPECTED[:2]
    assert len(state.requests) == 2
    state.requests.clear()
    with pytest.raises(ValueError, match=r"after 1 attempt, ReadTimeoutError \(.*Read timed out"):
        objective(state.url, timeout=0.5, retries=0).score(PROMPTS[:2], RESPONSES[:2])
    stop.set()


@pytest.mark.parametrize("stalled", [False, True])
def test_half_an_answer_is_a_failed_attempt(service: Any, stalled: bool) -> None:
    """The connection is closed within the body, or nothing more of it comes."""
    stop = threading.Event()

    def answer(number: int, content: dict[str, Any]) -> Answer:
        status, body, headers = right(content)
        if number == 0:
            return status, body[:5], {"Content-Length": str(len(body)), "Connection": "close"}
        return status, body, headers

    state = service(answer)
    state.after_body = lambda number: stop.wait(30) if stalled and number == 0 else None
    assert objective(state.url, timeout=0.5, retries=1).score(PROMPTS[:2], RESPONSES[:2]) == EXPECTED[:2]
    assert len(state.requests) == 2
    stop.set()


def test_a_long_retry_after_is_cut(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("gapo_mega.stopping.wait", waited.append)
    state = service(
        lambda number, content: (503, b"", {"Retry-After": "3600"}) if number == 0 else right(content)
    )
    assert objective(state.url).score(PROMPTS[:2], RESPONSES[:2]) == EXPECTED[:2]
    assert waited == [120.0]


def test_nobody_listens(service: Any) -> None:
    with reward_server._listening("127.0.0.1", 0) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=r"after 3 attempts, NewConnectionError \(.*refused"):
        objective(f"http://127.0.0.1:{port}/score", retries=2).score(PROMPTS[:2], RESPONSES[:2])


def test_headers_come_from_the_environment(service: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "Bearer abc")
    headers = {"Authorization": "env:REWARD_TOKEN", "X-Team": "red"}
    state = service(lambda number, content: right(content))
    objective(state.url, headers=headers).score(PROMPTS[:1], RESPONSES[:1])
    (sent,) = state.headers
    assert (sent["Authorization"], sent["X-Team"]) == ("Bearer abc", "red")
    monkeypatch.delenv("REWARD_TOKEN")
    with pytest.raises(ValueError, match=r"headers\.Authorization: found 'env:REWARD_TOKEN', .* is not set"):
        objective(state.url, headers=headers)
    monkeypatch.setenv("REWARD_TOKEN", "secret\n")
    with pytest.raises(ValueError, match=r"headers\.Authorization: found a name or value") as raised:
        objective(state.url, headers=headers)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"url": "localhost:8000"}, r"url: found 'localhost:8000', accepted: http://HOST"),
        ({"url": "http://me:pw@host/x"}, r"url: found a password in it, accepted: none"),
        ({"timeout": 0}, r"timeout: found 0, accepted: greater than 0"),
        ({"retries": -1}, r"retries: found -1, accepted: greater than or equal to 0"),
        ({"headers": {"X": 3}}, r"headers\.X: found 3, accepted: a valid string"),
        ({"concurency": 2}, r"concurency: unknown key, the nearest is 'concurrency'"),
    ],
)
def test_bad_options_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=rf"^objective 'helpful': options: {message}"):
        objective(**{"url": "http://localhost", **options})


def test_the_examples_of_the_page_are_valid() -> None:
    page = (Path(__file__).resolve().parents[3] / "docs" / "rewards.md").read_text(encoding="utf-8")
    entries = [
        entry
        for block in re.findall(r"```yaml\n(.*?)```", page, re.S)
        for entry in yaml.safe_load(block)["objectives"]
    ]
    sections = {"hf_classifier": HfClassifierOptions, "http": HttpOptions}
    found = [ObjectiveConfig.model_validate(entry, strict=True) for entry in entries]
    assert {"python", *sections} <= {entry.kind for entry in found}
    for entry in found:
        if entry.kind in sections:
            read_options(entry, sections[entry.kind])
    asked, answered = re.findall(r"```json\n(.*?)```", page, re.S)
    assert len(reward_server.ScoreRequest.model_validate_json(asked).samples) == 1
    assert reward_server.ScoreResponse.model_validate_json(answered).scores == [0.73]


@pytest.mark.parametrize(
    "url", ["http://host:99999/score", "http://host:abc/score", "http://me:secret@host:70000/x"]
)
def test_an_address_that_is_none_is_named(url: str) -> None:
    with pytest.raises(
        ValueError, match=r"objective '.*': options: url: found .*, accepted: a host and a port"
    ) as caught:
        objective(url)
    assert "secret" not in str(caught.value)


def test_columns_are_sent_and_those_of_other_objectives_are_not(service: Any) -> None:
    state = service(lambda number, content: (200, b'{"scores": [1, 2]}', {}))
    trial = build(ObjectiveConfig(name="a", kind="http", columns=["answer"], options={"url": state.url}))
    prompts = [Prompt(i, "?", columns={"answer": {"x": [i]}, "other": 1}) for i in range(2)]
    trial.check_prompts(prompts)
    assert trial.score(prompts, ["a", "b"]) == [1.0, 2.0]
    (request,) = state.requests
    assert [sample["columns"] for sample in request["samples"]] == [
        {"answer": {"x": [0]}},
        {"answer": {"x": [1]}},
    ]
    samples = reward_server.ScoreRequest.model_validate(request).samples
    assert [s.as_prompt(0).columns for s in samples] == [{"answer": {"x": [0]}}, {"answer": {"x": [1]}}]


@pytest.mark.parametrize("value", [float("nan"), b"x", {1, 2}, date(2026, 1, 2)])
def test_a_column_that_json_cannot_hold_is_refused_before_the_first_response(value: object) -> None:
    trial = build(
        ObjectiveConfig(name="a", kind="http", columns=["answer"], options={"url": "http://127.0.0.1:9/x"})
    )
    prompts = [Prompt(3, "?", columns={"answer": 1}), Prompt(4, "?", columns={"answer": [value]})]
    with pytest.raises(
        ValueError,
        match=r"^objective 'a': columns: found .* in column 'answer' of prompt 4, accepted: what JSON",
    ):
        trial.check_prompts(prompts)
