"""Responses that are asked for on threads of their own, while this one does other work."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from functools import partial
from math import inf
from threading import Event, Lock, Thread

from gapo_mega import stopping
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.responses import Response
from gapo_mega.whereabouts import get_on

_BETWEEN_LOOKS = 0.2  # seconds


class Requests:
    """Questions, numbered from 0, some of them at once; the first error ends the others.

    The threads do not keep a process alive that has nothing else to do: it may end at any moment.

    Attributes:
        seconds: from the first question to the last answer, or to the error; 0 before that.
        failed: the server whose error ended the others, if one did.
    """

    def __init__(self, ask: Callable[[int], Response], servers: Sequence[str], at_once: int) -> None:
        """Begins to ask. ``servers``: which of them has each question.

        ``ask`` is called on several threads, and must come to an end by itself.
        """
        self._ask = ask
        self._servers = servers
        self._count = count = len(servers)
        self._numbers = iter(range(count))
        self._found: dict[int, Response] = {}
        self.failed: str | None = None
        self._failure: BaseException | None = None
        self._lock = Lock()
        self._ended = Event()
        self._begun = time.perf_counter()
        self.seconds = 0.0
        if count == 0:
            self._end()
        for number in range(min(at_once, count)):
            Thread(target=self._work, name=f"rollout-{number}", daemon=True).start()

    def wait(self, seconds: float | None = None) -> bool:
        """Wait until all is answered, or one has failed; false where that has not come within ``seconds``.

        The phase goes on meanwhile: each question has a limit of its own.
        """
        return self._wait(seconds, get_on)

    def wait_unless_stopped(self, seconds: float | None = None) -> bool:
        """As ``wait``. Raises ``StoppedWaiting`` where the run is asked to stop before that."""
        return self._wait(seconds, partial(stopping.wait, 0))

    def _wait(self, seconds: float | None, look: Callable[[], None]) -> bool:
        end = inf if seconds is None else time.monotonic() + seconds
        while not self._ended.wait(min(max(0.0, end - time.monotonic()), _BETWEEN_LOOKS)):
            look()
            if time.monotonic() >= end:
                return False
        return True

    def responses(self) -> list[Response]:
        """All answers, in the order of their numbers.

        Raises the first error, and ``StoppedWaiting`` where the run is asked to stop before they are there.
        """
        self.wait_unless_stopped()
        if self._failure is not None:
            raise self._failure
        return [self._found[number] for number in range(self._count)]

    def what_is_open(self) -> str:
        """What those that wait are told."""
        with self._lock:
            found = set(self._found)
        urls = sorted({url for number, url in enumerate(self._servers) if number not in found})
        return f"{self._count - len(found)} of {self._count} responses of {', '.join(urls)}"

    def abandon(self) -> None:
        """Ask no further question; nobody waits for those that are under way."""
        self._fail(ServerLost("nobody waits for these responses any more"))

    def _work(self) -> None:
        while (number := self._next()) is not None:
            try:
                response = self._ask(number)
            except BaseException as error:  # whoever asks for the responses raises it
                self._fail(error, self._servers[number])
                return
            with self._lock:
                self._found[number] = response
                if len(self._found) == self._count:
                    self._end()

    def _next(self) -> int | None:
        with self._lock:
            return None if self._failure is not None else next(self._numbers, None)

    def _fail(self, error: BaseException, server: str | None = None) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._failure, self.failed = error, server
                self._end()

    def _end(self) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._ended.set()
