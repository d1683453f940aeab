"""Questions on threads of their own: order, the first error, and ends that wait for nothing."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator

import pytest

from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.requests import Requests
from gapo_mega.rollout.servers.responses import Response
from gapo_mega.stopping import StoppedWaiting, asked_by
from gapo_mega.whereabouts import moves


def answer(number: int) -> Response:
    return Response([number], [-1.0])


@pytest.fixture
def gate() -> Iterator[threading.Event]:
    """Nobody waits for it once the test is over."""
    event = threading.Event()
    yield event
    event.set()


def test_answers_come_in_the_order_of_the_questions_and_some_at_once() -> None:
    together = threading.Barrier(3, timeout=20)

    def ask(number: int) -> Response:
        together.wait()  # passes only where three are under way
        time.sleep(0.002 * (9 - number))
        return answer(number)

    requests = Requests(ask, ["http://s"] * 9, 3)
    assert [response.tokens for response in requests.responses()] == [[i] for i in range(9)]
    assert requests.seconds > 0
    assert [response.tokens for response in requests.responses()] == [[i] for i in range(9)]


def test_no_question_is_no_wait() -> None:
    assert Requests(answer, ["http://s"] * 0, 4).responses() == []


def test_the_first_error_ends_the_others_and_is_raised(gate: threading.Event) -> None:
    asked: list[int] = []

    def ask(number: int) -> Response:
        asked.append(number)
        if number == 1:
            raise ServerLost("http://s: found no answer")
        gate.wait(20)
        return answer(number)

    requests = Requests(ask, ["http://s"] * 100, 2)
    with pytest.raises(ServerLost, match=r"^http://s: found no answer$"):
        requests.responses()  # does not wait for the other one
    requests.wait()
    gate.set()
    assert sorted(asked) == [0, 1]


def test_a_run_that_is_asked_to_stop_waits_no_longer_and_may_come_back(gate: threading.Event) -> None:
    def ask(number: int) -> Response:
        gate.wait(20)
        return answer(number)

    requests = Requests(ask, ["http://s"] * 2, 2)
    with asked_by(lambda: True), pytest.raises(StoppedWaiting):
        requests.responses()
    gate.set()
    requests.wait()
    with asked_by(lambda: True):
        assert len(requests.responses()) == 2


def test_nobody_waits_for_what_is_abandoned(gate: threading.Event) -> None:
    def ask(number: int) -> Response:
        gate.wait(20)
        return answer(number)

    requests = Requests(ask, ["http://s"] * 2, 2)
    requests.abandon()
    requests.wait()
    with pytest.raises(ServerLost, match="nobody waits"):
        requests.responses()


@pytest.mark.parametrize("seconds", [None, 20.0])
def test_who_waits_gets_on(gate: threading.Event, seconds: float | None) -> None:
    """Each question has a limit of its own: the rank's own watch has nothing to end."""
    requests = Requests(lambda number: answer(number) if gate.wait(20) else answer(0), ["http://s"] * 1, 1)
    before = moves()
    timer = threading.Timer(1.0, gate.set)
    timer.start()
    assert requests.wait(seconds)
    assert moves() > before
    timer.join()


def test_a_wait_ends_in_time(gate: threading.Event) -> None:
    requests = Requests(lambda number: answer(number) if gate.wait(20) else answer(0), ["http://s"] * 1, 1)
    assert not requests.wait(0.3)
    assert not requests.wait(0.0)
