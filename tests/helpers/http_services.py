"""Services that score over HTTP: real sockets, answers that a test chooses."""

from __future__ import annotations

import contextlib
import json
import ssl
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from gapo_mega.config import ObjectiveConfig
from gapo_mega.objectives import Objective, build
from gapo_mega.types import Prompt

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
    paths: list[str] = field(default_factory=list)  # whole addresses where it is asked as a proxy
    times: list[float] = field(default_factory=list)
    url: str = ""
    after_body: Callable[[int], object] = lambda number: None  # before the connection is let go of


@contextlib.contextmanager
def services(
    tls: ssl.SSLContext | None = None,
) -> Iterator[Callable[[Callable[[int, dict[str, Any]], Answer]], Service]]:
    """Starts services in threads, and stops them at the end; ``tls``: by https, with its certificate."""
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
                    state.paths.append(self.path)
                    state.times.append(time.monotonic())
                status, body, headers = state.answer(number, content)
                self.send_response(status)
                length = {} if "Transfer-Encoding" in headers else {"Content-Length": str(len(body))}
                for name, value in (length | headers).items():
                    self.send_header(name, value)
                with contextlib.suppress(ConnectionError):  # a client that has given up
                    self.end_headers()
                    self.wfile.write(body)
                    self.wfile.flush()
                    state.after_body(number)

            def log_message(self, format: str, *arguments: Any) -> None:
                """Quiet."""

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        if tls is not None:
            # The handshake in the connection's own thread: one that fails is no end of the server.
            server.socket = tls.wrap_socket(server.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        servers.append((server, thread))
        state.url = f"{'http' if tls is None else 'https'}://127.0.0.1:{server.server_address[1]}/score"
        return state

    try:
        yield start
    finally:
        for server, thread in servers:
            server.shutdown()
            thread.join()
            server.server_close()


def in_chunks(body: bytes, size: int = 7) -> bytes:
    """``body`` as ``Transfer-Encoding: chunked`` has it."""
    pieces = [body[i : i + size] for i in range(0, len(body), size)]
    return b"".join(b"%x\r\n%b\r\n" % (len(piece), piece) for piece in [*pieces, b""])


def right(content: dict[str, Any]) -> Answer:
    scores = [2.0 * (float(s["response"]) - len(s["prompt"])) for s in content["samples"]]
    return 200, json.dumps({"scores": scores}).encode(), {}


def objective(url: str, **options: Any) -> Objective:
    options = {"url": url, "backoff": 0.01, **options}
    return build(ObjectiveConfig(name="helpful", kind="http", options=options))
