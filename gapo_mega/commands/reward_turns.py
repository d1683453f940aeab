"""Turns of requests at one objective: first come, first served, and nobody is served who has left."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Awaitable, Callable
from contextlib import suppress
from threading import Thread
from typing import Any, TypeVar

T = TypeVar("T")

BLOCKED_AFTER = 300.0  # seconds of one call, after which it counts as one that never ends
MOST_WAITING = 64  # requests
_LOOK_AGAIN = 1.0  # seconds after which a waiting request is asked whether its client is still there


class Full(Exception):
    """No further request is taken now; says why."""


class Abandoned(Exception):
    """The client has gone before its turn."""


class Turns:
    """Runs one call at a time, each in a thread that no end of the process waits for.

    Attributes:
        waiting: requests that wait for their turn.
        blocked_after: seconds after which a call counts as one that never ends.
    """

    def __init__(self, blocked_after: float, most_waiting: int = MOST_WAITING) -> None:
        self.waiting = 0
        self.blocked_after = blocked_after
        self._most_waiting = most_waiting
        self._turn = asyncio.Lock()
        self._begun: float | None = None  # of the call under way

    @property
    def busy_seconds(self) -> float | None:
        """For how long the call under way has run; None where there is none."""
        return None if self._begun is None else time.monotonic() - self._begun

    @property
    def blocked(self) -> bool:
        """Whether a call runs for longer than ``blocked_after``."""
        return (self.busy_seconds or 0.0) > self.blocked_after

    async def run(self, call: Callable[[], T], has_left: Callable[[], Awaitable[bool]]) -> T:
        """What ``call`` gives, or raises, in its turn.

        Raises ``Full`` where too many wait, or a call never ends, and ``Abandoned`` where ``has_left`` says
        so before the turn has come: nothing is computed then.
        """
        if self.blocked:
            raise Full(f"a request is being scored for {self.busy_seconds:.0f} s")
        if self.waiting >= self._most_waiting:
            raise Full(f"{self.waiting} requests are waiting")
        self.waiting += 1
        try:
            await self._wait(has_left)
        finally:
            self.waiting -= 1
        return await self._begin(call)

    async def _wait(self, has_left: Callable[[], Awaitable[bool]]) -> None:
        turn = asyncio.ensure_future(self._turn.acquire())
        try:
            while not turn.done():
                await asyncio.wait({turn}, timeout=_LOOK_AGAIN)
                if await has_left():
                    raise Abandoned
        except BaseException:
            if not turn.cancel():  # it is ours already
                self._turn.release()
            raise

    def _begin(self, call: Callable[[], T]) -> asyncio.Future[T]:
        """Start the thread. The turn lasts until it ends, also where nobody waits for its result any more."""
        loop = asyncio.get_running_loop()
        result: asyncio.Future[T] = loop.create_future()
        self._begun = time.monotonic()

        def end(settle: Callable[[Any], None], outcome: object) -> None:
            self._begun = None
            self._turn.release()
            if not result.done():
                settle(outcome)

        def work() -> None:
            try:
                outcome: object = call()
                settle: Callable[[Any], None] = result.set_result
            except BaseException as error:
                outcome, settle = error, result.set_exception
            with suppress(RuntimeError):  # the service has ended meanwhile
                loop.call_soon_threadsafe(end, settle, outcome)

        Thread(target=work, daemon=True, name="score").start()
        return result
