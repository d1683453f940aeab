"""What clients may do to ``serve-reward``, and what it says of itself, over real sockets."""

from __future__ import annotations

import json
import socket
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import requests
import uvicorn

from gapo_mega.commands import reward_app, reward_limits, reward_server
from gapo_mega.commands.reward_protocol import MOST_SAMPLES
from gapo_mega.commands.reward_turns import Turns
from gapo_mega.objectives.base import RewardFailed
from gapo_mega.types import Prompt, ResponseFacts


class Held:
    """An objective that scores when a test lets it."""

    name = "held"
    wanted_model = None
    reads_facts = False

    def __init__(self) -> None:
        self.let = threading.Event()
        self.begun = threading.Event()
        self.seen: list[str] = []

    def score(
        self, prompts: Sequence[Prompt], responses: Sequence[str], facts: ResponseFacts | None = None
    ) -> list[float]:
        self.seen += responses
        self.begun.set()
        if responses[0] == "fail":
            raise RewardFailed("objective 'held': /secret/place.py, line 3: KeyError: 'x'", "KeyError: 'x'")
        assert self.let.wait(30)
        return [1.0] * len(responses)


@contextmanager
def serving(app: Any, **settings: Any) -> Iterator[str]:
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", **settings))
    with reward_server._listening("127.0.0.1", 0) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        server.should_exit = True
        thread.join()


@pytest.fixture
def held() -> Iterator[Held]:
    objective = Held()
    yield objective
    objective.let.set()


def ask(root: str, response: str = "a", timeout: float = 30.0) -> requests.Response:
    content = {"samples": [{"prompt": "p", "response": response}]}
    return requests.post(f"{root}/score", json=content, timeout=timeout)


def in_thread(work: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=work)
    thread.start()
    return thread


def until(holds: Callable[[], bool]) -> None:
    for _ in range(1000):
        if holds():
            return
        time.sleep(0.01)
    raise AssertionError("never")


def health(root: str) -> tuple[int, dict[str, Any]]:
    answer = requests.get(f"{root}/health", timeout=10)
    return answer.status_code, answer.json()


def gives_up(root: str, response: str) -> None:
    with pytest.raises(requests.ReadTimeout):
        ask(root, response, timeout=0.3)


def test_a_request_whose_client_has_gone_is_never_scored(held: Held) -> None:
    """Else retries of clients pile up: work for nobody that never ends."""
    with serving(reward_server.create_app(held)) as root:
        first = in_thread(lambda: ask(root, "first"))
        assert held.begun.wait(10)
        for number in range(3):
            gives_up(root, f"gone {number}")
        last = in_thread(lambda: ask(root, "last"))
        until(lambda: health(root)[1]["waiting"] == 1)  # those who have gone left the queue before their turn
        held.let.set()
        first.join()
        last.join()
    assert held.seen == ["first", "last"]


def test_health_says_what_is_so(held: Held) -> None:
    with serving(reward_server.create_app(held, blocked_after=0.5)) as root:
        assert health(root) == (200, {"status": "ok", "objective": "held"})
        asking = in_thread(lambda: ask(root))
        assert held.begun.wait(10)
        status, found = health(root)
        assert (status, found["status"], found["waiting"]) == (200, "busy", 0) and found["busy_seconds"] < 0.5
        until(lambda: health(root)[1]["status"] == "blocked")
        status, found = health(root)
        assert status == 503 and found["busy_seconds"] >= 0.5
        refused = ask(root)
        assert refused.status_code == 503 and refused.json()["detail"].startswith(
            "busy: a request is being sc"
        )
        held.let.set()
        asking.join()
        assert health(root)[1]["status"] == "ok"
        assert ask(root).json() == {"scores": [1.0]}


def test_no_more_than_so_many_wait(held: Held, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reward_app, "Turns", lambda blocked_after: Turns(blocked_after, most_waiting=2))
    with serving(reward_server.create_app(held)) as root:
        asking = [in_thread(lambda: ask(root))]
        assert held.begun.wait(10)
        asking += [in_thread(lambda: ask(root)) for _ in range(2)]
        until(lambda: health(root)[1]["waiting"] == 2)
        answer = ask(root)
        assert (answer.status_code, answer.json()["detail"]) == (503, "busy: 2 requests are waiting")
        assert answer.headers["Retry-After"] == "5"
        held.let.set()
        for thread in asking:
            thread.join()


def test_where_the_users_code_fails_asking_again_may_help(
    held: Held, caplog: pytest.LogCaptureFixture
) -> None:
    with serving(reward_server.create_app(held)) as root:
        answer = ask(root, "fail")
    assert (answer.status_code, answer.json()) == (500, {"detail": "KeyError: 'x'"})
    assert "/secret/place.py, line 3" in caplog.text


def post(port: int, head: str, body: bytes = b"") -> socket.socket:
    connection = socket.create_connection(("127.0.0.1", port), timeout=20)
    connection.sendall(head.encode() + body)
    return connection


def received_until(connection: socket.socket, end: bytes) -> bytes:
    """What the service sends, which may come in several pieces."""
    found = b""
    while not found.endswith(end) and (piece := connection.recv(4096)):
        found += piece
    return found


HEAD = "POST /score HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\nContent-Length: {}\r\n\r\n"


def bounded(held: Held, **limits: Any) -> Any:
    """The application within limits of its own."""
    held.let.set()
    app = reward_server.create_app(held)
    app.user_middleware[0].kwargs.update(limits)
    return app


def test_a_body_that_comes_too_slowly_is_told(held: Held) -> None:
    with serving(bounded(held, seconds=0.3)) as root:
        with post(int(root.rsplit(":", 1)[1]), HEAD.format(100), b'{"sam') as connection:
            answer = received_until(connection, b"}")
        assert answer.startswith(b"HTTP/1.1 408 ") and b"after 0.3 s, accepted: all of it" in answer
        assert ask(root).json() == {"scores": [1.0]}


def test_the_bodies_of_all_requests_are_bounded(held: Held) -> None:
    with serving(bounded(held, most=1000, total=1500)) as root:
        port = int(root.rsplit(":", 1)[1])
        with post(port, HEAD.format(1000), b" " * 900):
            until(lambda: ask(root, "x" * 800).status_code == 503)
        until(lambda: ask(root, "x" * 800).status_code == 200)  # the first has let go of its connection


@pytest.mark.parametrize("digits", [9, 19, 25, 5000])
def test_a_declared_length_of_any_size_is_refused(held: Held, digits: int) -> None:
    with serving(bounded(held)) as root:
        with post(int(root.rsplit(":", 1)[1]), HEAD.format("9" * digits)) as connection:
            answer = connection.recv(4096)
        assert answer[:12] in (b"HTTP/1.1 413", b"HTTP/1.1 400")
        assert health(root)[1]["status"] == "ok"


def test_a_connection_that_asks_for_nothing_is_closed(held: Held) -> None:
    protocol = reward_limits.impatient_protocol(seconds=0.3)
    with serving(bounded(held), http=protocol) as root:
        port = int(root.rsplit(":", 1)[1])
        for begin in ("", "GET /health HTTP/1.1\r\nX-Slow: ", "GET /health HTTP/1.1\r\nHost: x\r\n\r\n"):
            with post(port, begin) as connection:
                received = b""
                while piece := connection.recv(4096):
                    received += piece
            assert (b"200 OK" in received) == begin.endswith("\r\n\r\n")


def test_a_request_that_is_scored_for_long_keeps_its_connection(held: Held) -> None:
    with serving(reward_server.create_app(held), http=reward_limits.impatient_protocol(seconds=0.2)) as root:
        answers: list[Any] = []
        asking = in_thread(lambda: answers.append(ask(root).json()))
        time.sleep(0.7)
        held.let.set()
        asking.join()
    assert answers == [{"scores": [1.0]}]


def test_connections_are_bounded(held: Held) -> None:
    with serving(bounded(held), http=reward_limits.impatient_protocol(most=3)) as root:
        port = int(root.rsplit(":", 1)[1])
        open_ones = [post(port, "") for _ in range(3)]
        time.sleep(0.2)
        with post(port, "") as one_more:
            assert one_more.recv(10) == b""
        for connection in open_ones:
            connection.close()
        until(lambda: _answers(root))


def _answers(root: str) -> bool:
    try:
        return health(root)[0] == 200
    except requests.ConnectionError:
        return False


def test_more_samples_than_a_request_may_have_are_one_line(held: Held) -> None:
    body = {"samples": [{}] * (MOST_SAMPLES + 1)}
    with serving(bounded(held)) as root:
        answer = requests.post(f"{root}/score", json=body, timeout=60)
    assert answer.status_code == 422 and len(json.dumps(answer.json())) < 500


def test_the_command_uses_these_limits() -> None:
    server = reward_server.server_of(reward_server.create_app(Held()))
    assert server.config.timeout_graceful_shutdown == reward_server.STOP_WITHIN <= 30
    assert getattr(server.config.http, "__name__", "") == "Impatient"
