"""Responses that are asked for on threads of their own, while this one does other work."""

from __future__ import annotations

import time
from collections.abc import Callable
from math import inf
from threading import Event, Lock, Thread

from gapo_mega import stopping
from gapo_mega.rollout.servers.lost import ServerLost
from gapo_mega.rollout.servers.responses import Response
from gapo_mega.whereabouts import get_on

_BETWEEN_LOOKS = 0.2  # seconds


class Requests:
    """Questions of the numbers 0 to ``count``, some of them at once; the first error ends the others.

    The threads do not keep a process alive that has nothing else to do: it may end at any moment.

    Attributes:
        seconds: from the first question to the last answer, or to the error; 0 before that.
    """

    def __init__(self, ask: Callable[[int], Response], count: int, at_once: int) -> None:
        """Begins to ask. ``ask`` is called on several threads, and must come to an end by itself."""
        self._ask = ask
        self._numbers = iter(range(count))
        self._found: dict[int, Response] = {}
        self._count = count
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
        end = inf if seconds is None else time.monotonic() + seconds
        while not self._ended.wait(min(max(0.0, end - time.monotonic()), _BETWEEN_LOOKS)):
            get_on()
            if time.monotonic() >= end:
                return False
        return True

    def responses(self) -> list[Response]:
        """All answers, in the order of their numbers.

        Raises the first error, and ``StoppedWaiting`` where the run is asked to stop before they are there.
        """
        while not self._ended.wait(_BETWEEN_LOOKS):
            stopping.wait(0)
        if self._failure is not None:
            raise self._failure
        return [self._found[number] for number in range(self._count)]

    def abandon(self) -> None:
        """Ask no further question; nobody waits for those that are under way."""
        self._fail(ServerLost("nobody waits for these responses any more"))

    def _work(self) -> None:
        while (number := self._next()) is not None:
            try:
                response = self._ask(number)
            except BaseException as error:  # whoever asks for the responses raises it
                self._fail(error)
                return
            with self._lock:
                self._found[number] = response
                if len(self._found) == self._count:
                    self._end()

    def _next(self) -> int | None:
        with self._lock:
            return None if self._failure is not None else next(self._numbers, None)

    def _fail(self, error: BaseException) -> None:
        with self._lock:
            if not self._ended.is_set():
                self._failure = error
                self._end()

    def _end(self) -> None:
        self.seconds = time.perf_counter() - self._begun
        self._ended.set()
