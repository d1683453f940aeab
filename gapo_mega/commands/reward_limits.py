"""What clients of ``gapo-mega serve-reward`` may cost: connections, bytes, and seconds to send a request."""

from __future__ import annotations

import asyncio
from typing import Any

LARGEST_BODY = 16 << 20  # bytes of a request; as Python objects it may take forty times as much
MOST_CONNECTIONS = 256
HEADERS_WITHIN = 20.0  # seconds until a connection has sent what comes before a body
BODY_WITHIN = 60.0  # seconds until a body is there
BODIES_AT_ONCE = 8  # times the largest body: bytes of all requests under way


class BodyLimit:
    """ASGI middleware that bounds bodies: 413 for one of more than ``most`` bytes, 408 for one that comes too
    slowly, 503 while all that are under way have ``total`` bytes. No more of it is read then.
    """

    def __init__(self, app: Any, most: int, total: int | None = None, seconds: float = BODY_WITHIN) -> None:
        self._app = app
        self._most = most
        self._total = BODIES_AT_ONCE * most if total is None else total
        self._seconds = seconds
        self._held = 0  # bytes of all requests under way

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        body = _Body(self, scope, receive)
        try:
            await self._app(scope, body.receive, send)
        finally:
            self._held -= body.read

    def take(self, read: int, size: int) -> None:
        """Count ``read`` bytes more of a body of ``size`` bytes so far (or as declared)."""
        from fastapi import HTTPException

        self._held += read
        if size > self._most:
            raise HTTPException(
                413, f"body: found more than {self._most} bytes, accepted: fewer samples in a request"
            )
        if self._held > self._total:
            raise HTTPException(
                503,
                f"body: found more than {self._total} bytes in all requests under way",
                {"Retry-After": "5"},
            )

    async def in_time(self, receive: Any, deadline: float) -> Any:
        """The next message, which has to come before ``deadline`` of the loop's clock."""
        from fastapi import HTTPException

        try:
            return await asyncio.wait_for(receive(), deadline - asyncio.get_running_loop().time())
        except asyncio.TimeoutError:
            raise HTTPException(
                408, f"body: found a part of it after {self._seconds:g} s, accepted: all of it"
            ) from None

    def deadline(self) -> float:
        """When a body that begins now has to be there."""
        return asyncio.get_running_loop().time() + self._seconds


class _Body:
    """Reads the body of one request; ``read`` bytes of it are counted."""

    def __init__(self, limit: BodyLimit, scope: Any, receive: Any) -> None:
        declared = dict(scope.get("headers", ())).get(b"content-length", b"")
        # More digits than that are more bytes than anything; int() would refuse them in its own words.
        self._declared = int(declared[:20]) if declared[:20].isdigit() else 0
        self._limit = limit
        self._receive = receive
        self._deadline: float | None = None
        self._whole = scope.get("type") != "http"
        self.read = 0

    async def receive(self) -> Any:
        if self._whole:  # what comes now is the client's end
            return await self._receive()
        if self._deadline is None:
            self._deadline = self._limit.deadline()
            self._limit.take(0, self._declared)
        message = await self._limit.in_time(self._receive, self._deadline)
        read = len(message.get("body", b""))
        self.read += read
        self._whole = not message.get("more_body", False)
        self._limit.take(read, max(self.read, self._declared))
        return message


def impatient_protocol(most: int = MOST_CONNECTIONS, seconds: float = HEADERS_WITHIN) -> type[Any]:
    """uvicorn's protocol that lets go of connections beyond ``most``, and of those that ask for nothing.

    ``seconds``: a connection that has no request under way at the end of such a time is closed.
    """
    from uvicorn.protocols.http.h11_impl import H11Protocol

    class Impatient(H11Protocol):
        _watch: asyncio.TimerHandle | None = None

        def connection_made(self, transport: Any) -> None:
            super().connection_made(transport)
            if len(self.connections) > most:
                transport.close()
                return
            self._watch = self.loop.call_later(seconds, self._look)

        def connection_lost(self, exc: Exception | None) -> None:
            if self._watch is not None:
                self._watch.cancel()
            super().connection_lost(exc)

        def _look(self) -> None:
            if self.cycle is None or self.cycle.response_complete:
                self.transport.close()
            else:
                self._watch = self.loop.call_later(seconds, self._look)

    return Impatient
