"""Rewards over HTTP: real sockets, the real command, and services that fail."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib.metadata import PackageNotFoundError
from pathlib import Path
from typing import Any

import pytest
import requests
import yaml

from gapo_mega import optional
from gapo_mega.commands import reward_server
from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import Objective, build
from gapo_mega.objectives.hf_classifier import HfClassifierOptions
from gapo_mega.objectives.http import HttpOptions
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

REWARDS = '''
def difference(prompts, responses, *, scale=1.0):
    """Numbers in, numbers out, so that a wrong order or pairing shows."""
    for prompt in prompts:
        if prompt == "refuse":
            raise ValueError("found a prompt that\\nis refused")
    return [scale * (float(response) - len(prompt)) for prompt, response in zip(prompts, responses)]
'''
PROMPTS = [Prompt(i, "x" * (i % 7)) for i in range(50)]
RESPONSES = [str(i) for i in range(50)]
EXPECTED = [2.0 * (i - i % 7) for i in range(50)]

Answer = tuple[int, bytes, dict[str, str]]


@dataclass
class Service:
    """A small HTTP server whose answers a test chooses; it keeps what it was asked."""

    answer: Callable[[int, dict[str, Any]], Answer]  # number of the request from 0, its JSON
    requests: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    times: list[float] = field(default_factory=list)
    url: str = ""
    after_body: Callable[[int], object] = lambda number: None  # before the connection is let go of


@pytest.fixture
def service() -> Iterator[Callable[[Callable[[int, dict[str, Any]], Answer]], Service]]:
    servers = []

    def start(answer: Callable[[int, dict[str, Any]], Answer]) -> Service:
        state = Service(answer)
        lock = threading.Lock()

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self) -> None:
                content = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    number = len(state.requests)
                    state.requests.append(content)
                    state.headers.append(dict(self.headers))
                    state.times.append(time.monotonic())
                status, body, headers = state.answer(number, content)
                self.send_response(status)
                for name, value in {"Content-Length": str(len(body)), **headers}.items():
                    self.send_header(name, value)
                with contextlib.suppress(ConnectionError):  # a client that has given up
                    self.end_headers()
                    self.wfile.write(body)
                    self.wfile.flush()
                    state.after_body(number)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        state.url = f"http://127.0.0.1:{server.server_address[1]}/score"
        return state

    yield start
    for server, thread in servers:
        server.shutdown()
        thread.join()
        server.server_close()


def right(content: dict[str, Any]) -> Answer:
    scores = [2.0 * (float(s["response"]) - len(s["prompt"])) for s in content["samples"]]
    return 200, json.dumps({"scores": scores}).encode(), {}


def objective(url: str, **options: Any) -> Objective:
    options = {"url": url, "backoff": 0.01, **options}
    return build(ObjectiveConfig(name="helpful", kind="http", options=options))


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of ``gapo-mega serve-reward`` with a Python function, as a process of its own."""
    folder = tmp_path_factory.mktemp("served")
    (folder / "served_rewards.py").write_text(REWARDS)
    (folder / "objective.yaml").write_text(
        "name: gap\nfunction: served_rewards:difference\noptions: {scale: 1.0}\n"
    )
    command = [sys.executable, "-m", "gapo_mega.cli", "serve-reward", "--port", "0"]
    with subprocess.Popen(
        [*command, "--config", str(folder / "objective.yaml"), "options.scale=2.0"],
        env={**os.environ, "PYTHONPATH": str(folder)},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        assert process.stdout is not None
        line = process.stdout.readline()  # ends, empty, with the process
        assert line.startswith("objective gap is served at http://127.0.0.1:"), line
        yield line.split()[-1]
        process.terminate()
        assert process.wait(timeout=30) in (0, -signal.SIGTERM)


@pytest.mark.parametrize(("batch_size", "concurrency"), [(64, 1), (7, 4), (1, 16)])
def test_the_command_serves_what_the_objective_asks_in_order(
    served: str, batch_size: int, concurrency: int
) -> None:
    scored = objective(served, batch_size=batch_size, concurrency=concurrency)
    assert scored.score(PROMPTS, RESPONSES) == EXPECTED


def test_health_and_what_is_refused(served: str) -> None:
    root = served.removesuffix("/score")
    assert requests.get(f"{root}/health", timeout=10).json() == {"status": "ok", "objective": "gap"}
    minimal = requests.post(served, json={"samples": [{"prompt": "ab", "response": "5"}]}, timeout=10)
    assert (minimal.status_code, minimal.json()) == (200, {"scores": [6.0]})
    other = [{"role": "user", "content": "ab"}, {"role": "assistant", "content": "6"}]
    for malformed in (
        {},
        {"samples": []},
        {"samples": [{"prompt": "a"}]},
        {"samples": [{"prompt": "a", "response": 1}]},
        {"samples": [{"prompt": "ab", "response": "5", "messages": other}]},
        {"samples": [{"prompt": "ab", "response": "5", "messages": []}]},
        {"samples": [{"prompt": "ab", "response": "5", "reply": ""}]},
    ):
        assert requests.post(served, json=malformed, timeout=10).status_code == 422, malformed
    assert requests.post(served, data="{", timeout=10).status_code == 422


def test_what_the_served_objective_refuses_reaches_the_client_without_a_retry(served: str) -> None:
    with pytest.raises(
        ValueError, match=r"objective 'helpful': http.*after 1 attempt, status 422 .*is refused"
    ):
        objective(served).score([Prompt(0, "refuse")], ["1"])


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
    monkeypatch.setattr("tenacity.nap.time.sleep", waited.append)
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


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ((None, None, None), r"serve-reward: found no objective, accepted: one of --config, --model and"),
        ((None, "m", "a:b"), r"serve-reward: found --model and --function"),
        ((Path("/nowhere.yaml"), None, None), r"config: file /nowhere.yaml not found"),
    ],
)
def test_one_objective_is_served(given: tuple[Any, ...], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reward_server.objective_config(*given, [])


def test_shortcuts_take_overrides() -> None:
    model = reward_server.objective_config(None, "dir", None, ["options.sign=-1", "clip=3"])
    assert (model.kind, model.options, model.clip) == ("hf_classifier", {"model": "dir", "sign": -1}, 3)
    function = reward_server.objective_config(None, None, "a:b", [])
    assert (function.kind, function.function) == ("python", "a:b")
    with pytest.raises(ValueError, match=r"clip: found -1, .* \(from override 'clip=-1'\)"):
        reward_server.objective_config(None, "dir", None, ["clip=-1"])


def test_a_port_that_is_taken_is_refused(service: Any) -> None:
    state = service(lambda number, content: right(content))
    port = int(state.url.split(":")[2].removesuffix("/score"))
    with pytest.raises(ValueError, match=rf"--host, --port: found 127.0.0.1 and {port}: .*in use"):
        reward_server.serve(ObjectiveConfig(name="a", function="builtins:max"), "127.0.0.1", port)


def test_without_the_extra_it_is_said_what_is_lost(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(optional, "version", not_installed)
    optional.serve.cache_clear()
    try:
        with pytest.raises(
            ValueError, match=r"fastapi and uvicorn not installed; run `pip install 'gapo-mega\[s"
        ):
            reward_server.serve(ObjectiveConfig(name="a", function="builtins:max"), "127.0.0.1", 0)
    finally:
        optional.serve.cache_clear()


def not_installed(name: str) -> str:
    raise PackageNotFoundError(name)


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
