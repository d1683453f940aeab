"""What a service may cost: bytes, seconds and patience, over real sockets."""

from __future__ import annotations

import gzip
import json
import logging
import re
import socket
import threading
import time
import tracemalloc
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from gapo_mega.objectives.json_service import LARGEST_ANSWER, TO_END
from gapo_mega.objectives.limited_request import Limits, NotWhole, Route, limited_post
from gapo_mega.stopping import StoppedWaiting, asked_by
from tests.helpers.http_services import EXPECTED, PROMPTS, RESPONSES, Answer, objective, right, services


@pytest.fixture
def service() -> Iterator[Any]:
    with services() as start:
        yield start


def score(url: str, **options: Any) -> list[float]:
    return objective(url, **options).score(PROMPTS[:2], RESPONSES[:2])


def packed(kind: str, body: bytes) -> bytes:
    half = len(body) // 2
    return {
        "identity": lambda: body,
        "gzip": lambda: gzip.compress(body),
        "deflate": lambda: zlib.compress(body),
        "members": lambda: gzip.compress(body[:half]) + gzip.compress(body[half:]),
    }[kind]()


@pytest.mark.parametrize("kind", ["identity", "gzip", "deflate", "members"])
@pytest.mark.parametrize("length", [30, 200_000])  # also over several pieces of the connection
def test_packed_answers_are_read(service: Any, kind: str, length: int) -> None:
    body = b'{"scores": [1, 2]}' + b" " * length
    encoding = "gzip" if kind == "members" else kind
    state = service(lambda number, content: (200, packed(kind, body), {"Content-Encoding": encoding}))
    assert score(state.url) == [1.0, 2.0]
    assert state.headers[0]["Accept-Encoding"] == "identity"


def bomb(kind: str) -> bytes:
    """An answer of 128 MiB: an eighth of a megabyte when packed."""
    packer = zlib.compressobj(wbits=31 if kind == "gzip" else 15)
    piece = b" " * (1 << 20)
    return b"".join(packer.compress(piece) for _ in range(1 << 7)) + packer.flush()


@pytest.mark.parametrize("kind", ["gzip", "deflate"])
def test_an_answer_is_not_unpacked_beyond_the_limit(service: Any, kind: str) -> None:
    body = bomb(kind)
    state = service(lambda number, content: (200, body, {"Content-Encoding": kind}))
    tracemalloc.start()
    try:
        with pytest.raises(
            ValueError, match=rf"after 1 attempt, status 200 with more than {LARGEST_ANSWER} byt"
        ):
            score(state.url)
        assert tracemalloc.get_traced_memory()[1] < 6 * LARGEST_ANSWER
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize("status", [200, 503])
def test_a_plain_answer_is_not_read_beyond_the_limit(service: Any, status: int) -> None:
    state = service(lambda number, content: (status, b"x" * (LARGEST_ANSWER + 1), {}))
    with pytest.raises(
        ValueError, match=rf"after 1 attempt, status {status} with more than \d+ bytes; accepted"
    ):
        score(state.url)


@pytest.mark.parametrize(
    ("encoding", "body", "found"),
    [
        ("br", b"x", "status 200 with Content-Encoding 'br'"),
        ("gzip, gzip", b"x", "status 200 with Content-Encoding 'gzip, gzip'"),
        ("gzip", b"no gzip", r"status 200 with a body that is no gzip \("),
        ("gzip", gzip.compress(b'{"scores": [1, 2]}', mtime=0)[:-9], "status 200 with half a body of gzip"),
    ],
)
def test_a_body_that_cannot_be_unpacked_is_told(service: Any, encoding: str, body: bytes, found: str) -> None:
    state = service(lambda number, content: (200, body, {"Content-Encoding": encoding}))
    with pytest.raises(ValueError, match=rf"^objective 'helpful': .* found, after 1 attempt, {found}"):
        score(state.url, retries=0)


@contextmanager
def trickling(first: bytes) -> Iterator[str]:
    """A service that takes a request and answers ``first`` one byte every 2 ms, for ever."""
    stop = threading.Event()

    def serve(listener: socket.socket) -> None:
        while not stop.is_set():
            connection, _ = listener.accept()
            with connection:
                try:
                    connection.recv(1 << 16)
                    for place in range(1 << 20):
                        if stop.wait(0.002):
                            break
                        connection.sendall(first[place : place + 1] or b"x")
                except OSError:
                    continue

    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=serve, args=(listener,))
        thread.start()
        port = listener.getsockname()[1]
        try:
            yield f"http://127.0.0.1:{port}/score"
        finally:
            stop.set()
            socket.create_connection(("127.0.0.1", port)).close()
            thread.join()


@pytest.mark.parametrize(
    "first",
    [
        b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n",  # then the body, byte by byte
        b"HTTP/1.1 200 OK\r\nX-Header: ",  # a header without an end
    ],
)
def test_the_time_of_an_attempt_is_limited_whatever_trickles_in(first: bytes) -> None:
    """Before, every byte began the time anew."""
    late = r"after 2 attempts.*, no whole answer within 0\.7 s; accepted"
    with trickling(first) as url, pytest.raises(ValueError, match=late):
        score(url, timeout=60.0, total_timeout=0.7, retries=1)


@pytest.mark.parametrize("first", [b"HTTP/1.1 200 OK\r\nContent-Length: 100000\r\n\r\n", b""])
def test_a_run_that_is_asked_to_stop_does_not_wait_for_what_trickles_in(first: bytes) -> None:
    """But for the seconds that its requests have then; where there is no such limit, it waits."""
    with trickling(first) as url, asked_by(lambda: True):
        with pytest.raises(StoppedWaiting):
            limited_post(url, {}, {}, Limits(60.0, 60.0, 10**6, stopping=0.3), Route())
        with pytest.raises(NotWhole, match=r"within 0\.7 s"):
            limited_post(url, {}, {}, Limits(60.0, 0.7, 10**6), Route())


def test_what_comes_soon_enough_counts_although_the_run_is_asked_to_stop(service: Any) -> None:
    """A service's requests have ``TO_END``; nothing is asked a second time."""
    assert TO_END >= 5

    def slow(number: int, content: dict[str, Any]) -> Answer:
        time.sleep(1.0)
        return right(content)

    state = service(slow)
    with asked_by(lambda: True):
        assert score(state.url) == EXPECTED[:2]


def test_a_service_that_is_down_is_waited_for_and_the_log_says_how_long(
    service: Any, caplog: pytest.LogCaptureFixture
) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    with pytest.raises(ValueError, match=r"after \d\d?\d? attempts in [12] s, NewConnectionError .*refused"):
        score(f"http://127.0.0.1:{port}/score", patience=1.2)
    lines = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert lines and all("refused" in line and "\n" not in line for line in lines)
    assert re.search(r"asks again in [\d.e-]+ s, has waited \d s of 1.2 s \(patience\)$", lines[0])


def test_a_service_that_comes_back_is_used(service: Any) -> None:
    """More failures than the default of earlier versions, which was six attempts."""
    state = service(lambda number, content: (503, b"", {}) if number < 12 else right(content))
    assert score(state.url, backoff=0.0) == EXPECTED[:2]


def test_patience_zero_asks_once(service: Any) -> None:
    state = service(lambda number, content: (503, b"", {}))
    with pytest.raises(ValueError, match="after 1 attempt, status 503"):
        score(state.url, patience=0)
    assert len(state.requests) == 1


def test_what_the_log_says_of_a_failure_has_no_credential(
    service: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("REWARD_TOKEN", "Bearer configured-8f3a")

    def answer(number: int, content: dict[str, Any]) -> Answer:
        return (503, b"no: Bearer configured-8f3a", {}) if number == 0 else right(content)

    state = service(answer)
    assert score(state.url, headers={"Authorization": "env:REWARD_TOKEN"}) == EXPECTED[:2]
    assert "status 503" in caplog.text and "configured" not in caplog.text


def test_a_judge_has_the_same_limits(service: Any) -> None:
    from gapo_mega.objectives.pairwise import PairwiseJudge, PairwiseOptions

    judge: Callable[..., PairwiseJudge] = lambda **more: PairwiseJudge(  # noqa: E731
        PairwiseOptions.model_validate(
            {"url": state.url.removesuffix("/score"), "model": "m", "rubrics": {"a": "b"}, **more}
        ),
        "--judge x",
    )
    state = service(lambda number, content: (200, json.dumps("x" * LARGEST_ANSWER).encode(), {}))
    with pytest.raises(ValueError, match=r"^--judge x: .*with more than \d+ bytes"):
        judge().ask({})
    state.answer = lambda number, content: (503, b"", {})
    with pytest.raises(ValueError, match=r"^--judge x: .*after 1 attempt, status 503"):
        judge(patience=0).ask({})
