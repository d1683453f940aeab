"""What a server may cost that does not answer as vLLM does: seconds and bytes, over real sockets."""

from __future__ import annotations

import gzip
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress

import pytest

from gapo_mega.rollout.servers import client
from gapo_mega.rollout.servers.client import Patience, VllmServer
from gapo_mega.rollout.servers.lost import ServerLost

HEAD = b"HTTP/1.1 200 OK\r\nContent-Type: application/json\r\n"


@contextmanager
def answering(answer: Callable[[socket.socket], None]) -> Iterator[str]:
    """A server that reads a request and then does ``answer`` on the connection, one after another."""
    with socket.create_server(("127.0.0.1", 0)) as listening:

        def serve() -> None:
            with suppress(OSError):  # the test is over
                while True:
                    connection, _ = listening.accept()
                    with connection, suppress(OSError):
                        connection.recv(65536)
                        answer(connection)

        threading.Thread(target=serve, daemon=True).start()
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        listening.shutdown(socket.SHUT_RDWR)


def drip(connection: socket.socket) -> None:
    connection.sendall(HEAD + b"Content-Length: 100000\r\n\r\n")
    for _ in range(200):
        connection.sendall(b" ")
        time.sleep(0.05)


def bomb(connection: socket.socket) -> None:
    body = gzip.compress(b" " * (64 << 20))
    connection.sendall(HEAD + b"Content-Encoding: gzip\r\nContent-Length: %d\r\n\r\n%b" % (len(body), body))


def test_one_byte_after_another_is_no_answer(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(client, "_SHORT", 0.5)
    with answering(drip) as url:
        server = VllmServer(url, Patience(20, 0, 20))
        with pytest.raises(ServerLost, match=rf"^{url}/weight_info: found no answer: no whole answer within"):
            server.version()


def test_an_answer_is_not_unpacked_beyond_the_limit() -> None:
    with answering(bomb) as url:
        server = VllmServer(url, Patience(20, 0, 20))
        with pytest.raises(ServerLost, match="status 200 with more than 1048576 bytes"):
            server.version()
