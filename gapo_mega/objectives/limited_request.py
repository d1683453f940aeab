"""One request with limits: seconds to the last byte, and bytes of the answer once decompressed.

The libraries limit the silence between two bytes only, and decompress whatever comes. Nothing of the
environment counts here: no ``~/.netrc``, no proxy, no certificates but those that are asked for.
"""

from __future__ import annotations

import math
import socket
import time
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from threading import Event, Lock, Thread
from typing import Any

import requests
from requests.adapters import HTTPAdapter
from urllib3.connectionpool import HTTPConnectionPool
from urllib3.exceptions import HTTPError

from gapo_mega import stopping

_PIECE = 1 << 16  # bytes read at once


@dataclass(frozen=True)
class Limits:
    """Of one request: seconds of silence, seconds and bytes in all, seconds once the run is asked to stop."""

    silence: float
    seconds: float
    bytes: int
    stopping: float = math.inf


@dataclass(frozen=True)
class Route:
    """How a service is reached: straight, or by a proxy; a file of certificates, or the usual ones."""

    proxy: str | None = None
    certificates: str | None = None


@dataclass(frozen=True)
class Answer:
    """Status, headers and decompressed body."""

    status: int
    headers: Mapping[str, str]
    body: bytes


class NotWhole(Exception):
    """The answer did not come to its end, which may go better next time; says why."""


class NotTaken(Exception):
    """The answer is larger than the limit, or packed in a way that is not read; says how."""


def limited_post(url: str, content: Any, headers: Mapping[str, str], limits: Limits, route: Route) -> Answer:
    """Post ``content`` as JSON; no redirects are followed.

    Raises ``NotWhole``, ``NotTaken``, ``StoppedWaiting`` where ``limits.stopping`` ends it, or
    ``requests.RequestException`` where no answer begins.
    """
    return _limited("POST", url, content, headers, limits, route)


def limited_get(url: str, limits: Limits) -> Answer:
    """As ``limited_post``, without anything to send, and straight."""
    return _limited("GET", url, None, {}, limits, Route())


def _limited(
    method: str, url: str, content: Any, headers: Mapping[str, str], limits: Limits, route: Route
) -> Answer:
    with requests.Session() as session, _Deadline(limits).passing() as deadline:
        session.trust_env = False
        session.mount("http://", _Watched(deadline))
        session.mount("https://", _Watched(deadline))
        session.headers["Accept-Encoding"] = "identity"
        with session.request(
            method,
            url,
            json=content,
            headers=dict(headers),
            proxies={} if route.proxy is None else {"http": route.proxy, "https": route.proxy},
            verify=True if route.certificates is None else route.certificates,
            timeout=limits.silence,
            # A redirected POST would become a GET, and the headers are meant for this host alone.
            allow_redirects=False,
            stream=True,
        ) as answer:
            return Answer(answer.status_code, answer.headers, _body(answer, limits.bytes))


def _body(answer: requests.Response, most: int) -> bytes:
    packed = answer.headers.get("Content-Encoding", "identity").strip().lower()
    if packed not in ("identity", "", "gzip", "x-gzip", "deflate"):
        raise NotTaken(f"status {answer.status_code} with Content-Encoding {packed[:40]!r}")
    unpack = _Plain() if packed in ("identity", "") else _Zipped()
    body = bytearray()
    try:
        for piece in answer.raw.stream(_PIECE, decode_content=False):
            body += unpack(piece, most + 1 - len(body))
            if len(body) > most:
                raise NotTaken(f"status {answer.status_code} with more than {most} bytes")
    except HTTPError as error:
        raise NotWhole(f"{type(error).__name__} ({error})") from error
    except zlib.error as error:
        raise NotTaken(f"status {answer.status_code} with a body that is no {packed} ({error})") from error
    if not unpack.ended:
        raise NotWhole(f"status {answer.status_code} with half a body of {packed}")
    return bytes(body)


class _Plain:
    """A body as it is."""

    ended = True  # where it ends is the connection's matter

    def __call__(self, piece: bytes, most: int) -> bytes:
        return piece


class _Zipped:
    """Unpacks gzip and zlib; what is beyond ``most`` bytes is never made."""

    def __init__(self) -> None:
        self._unpacker = _unpacker()
        self._begun = False

    @property
    def ended(self) -> bool:
        return not self._begun or self._unpacker.eof

    def __call__(self, piece: bytes, most: int) -> bytes:
        found = bytearray()
        while piece and len(found) < most:
            if self._unpacker.eof:  # several gzip members after one another are one body
                self._unpacker = _unpacker()
            self._begun = True
            found += self._unpacker.decompress(piece, most - len(found))
            piece = self._unpacker.unconsumed_tail or self._unpacker.unused_data
        return bytes(found)


def _unpacker() -> Any:
    return zlib.decompressobj(zlib.MAX_WBITS | 32)  # 32: the header says whether it is gzip or zlib


class _Deadline:
    """After some seconds, and fewer if the run is asked to stop, cuts the connections that it watches.

    Whoever reads them sees their end.
    """

    def __init__(self, limits: Limits) -> None:
        self._limits = limits
        self._reason: Exception | None = None  # for which it has cut them
        self._ended = Event()
        self._watched: list[socket.socket] = []
        self._lock = Lock()

    def watch(self, connection: socket.socket) -> None:
        with self._lock:
            self._watched.append(connection)
            reason = self._reason
        if reason is not None:
            self._cut(reason)

    @contextmanager
    def passing(self) -> Iterator[_Deadline]:
        """In the block time passes. Errors after the cut become ``NotWhole`` or ``StoppedWaiting``."""
        Thread(target=self._pass, name="deadline", daemon=True).start()
        try:
            yield self
        except (NotWhole, requests.RequestException) as error:
            if self._reason is None:
                raise
            raise self._reason from error
        finally:
            self._ended.set()
        if self._reason is not None:  # a cut header or body may look like a whole one
            raise self._reason

    def _pass(self) -> None:
        seconds = self._limits.seconds
        end, leave = time.monotonic() + seconds, math.inf
        while not self._ended.wait(max(0.0, min(end - time.monotonic(), stopping.BETWEEN_LOOKS))):
            now = time.monotonic()
            if leave == math.inf and stopping.asked():
                leave = now + self._limits.stopping
            if now >= min(end, leave):
                stopped = leave < end
                self._cut(
                    stopping.StoppedWaiting()
                    if stopped
                    else NotWhole(f"no whole answer within {seconds:g} s")
                )
                return

    def _cut(self, reason: Exception) -> None:
        with self._lock:
            self._reason = reason
            for connection in self._watched:
                with suppress(OSError):  # it has ended by itself
                    connection.shutdown(socket.SHUT_RDWR)


class _Watched(HTTPAdapter):
    """Tells a deadline of the connections that are opened."""

    def __init__(self, deadline: _Deadline) -> None:
        super().__init__()
        self._deadline = deadline

    def get_connection_with_tls_context(self, *arguments: Any, **options: Any) -> HTTPConnectionPool:
        pool = super().get_connection_with_tls_context(*arguments, **options)
        pool.ConnectionCls = _watched(pool.ConnectionCls, self._deadline)
        return pool


def _watched(kind: Any, deadline: _Deadline) -> Any:
    class Connection(kind):  # type: ignore[misc]
        def connect(self) -> None:
            super().connect()
            deadline.watch(self.sock)

    return Connection
