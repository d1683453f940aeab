"""A small server that speaks what we use of vLLM's HTTP API (0.32), over a real socket.

Its model is a table: the tensor ``table`` [V, V] has the logits of the token after each token. It holds
clients to the order of an update: paused, begun, taken, loaded, cache reset, labelled, ready again. Asleep it
answers nothing: weights come after they are awake, and its cache wakes after them.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np
from safetensors.numpy import load_file


class _Listening(ThreadingHTTPServer):
    request_queue_size = 256  # connections that come at once; 5 by default, and the others are reset


class TableServer:
    """One server. ``fail`` may answer a request in its place: (path, content) -> (status, answer) or None.

    Attributes:
        calls: paths that were asked for, ``generate`` aside, in order.
        generated: how many responses were asked for.
        asked: label of the weights, prompt and sampling settings of every response, in order of arrival.
        seconds_per_token: that a response takes.
        table: its weights, float64.
        label: of the weights.
        asleep: what of its memory is freed: ``weights``, ``kv_cache``.
    """

    def __init__(self, port: int = 0) -> None:
        self.fail: Callable[[str, Any], tuple[int, Any] | None] = lambda path, content: None
        self.calls: list[str] = []
        self.pieces: list[list[str]] = []
        self.generated = 0
        self.asked: list[tuple[str, tuple[int, ...], dict[str, Any]]] = []
        self.seconds_per_token = 0.0
        self.table = np.zeros((2, 2))
        self.label = "default"
        self.asleep: set[str] = set()
        self._state = "ready"
        self._loading: dict[str, np.ndarray] = {}
        self._lock = threading.Lock()
        self._server = _Listening(("127.0.0.1", port), self._handler())
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.01,), daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def updating(self) -> list[str]:
        """``calls`` without those that ask how it is."""
        return [call for call in self.calls if call not in ("/health", "/weight_info")]

    def close(self) -> None:
        """No longer listen."""
        self._server.shutdown()
        self._server.server_close()

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        server = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                self._answer(None)

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
                self._answer(json.loads(body) if body else None)

            def _answer(self, content: Any) -> None:
                status, answer = server.fail(self.path, content) or server.answer(self.path, content)
                if status == 0:  # the connection ends without an answer
                    self.close_connection = True
                    return
                body = b"" if answer is None else json.dumps(answer).encode()
                self.send_response(status)
                self.send_header("Content-Length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: Any) -> None:
                pass

        return Handler

    def answer(self, path: str, content: Any) -> tuple[int, Any]:
        """Status and JSON."""
        if path == "/inference/v1/generate":
            with self._lock:
                self.generated += 1
                self.asked.append((self.label, tuple(content["token_ids"]), content["sampling_params"]))
            if self._state != "ready" or self.asleep:
                return 500, {"error": f"asked while {self._state}, asleep: {sorted(self.asleep)}"}
            return 200, {"choices": [self._choice(content["token_ids"], content["sampling_params"])]}
        with self._lock:
            self.calls.append(path)
            return self._update(path, content)

    def _update(self, path: str, content: Any) -> tuple[int, Any]:
        if path == "/health":
            return 200, None
        if path == "/weight_info":
            return 200, {"weight_version": self.label}
        if path == "/start_weight_update":
            return self._started()
        if path == "/update_weights":
            return self._take(content["update_info"])
        if path == "/finish_weight_update":
            return self._finished()
        if path == "/sleep?level=2":
            self.asleep, self.table = {"weights", "kv_cache"}, np.full_like(self.table, np.nan)
            return 200, None
        if path in ("/wake_up?tags=weights", "/wake_up?tags=kv_cache"):
            self.asleep.discard(path.split("=")[1])
            return 200, None
        if path == "/reset_prefix_cache":
            if self.asleep:
                return 500, {"error": f"asleep: {sorted(self.asleep)}"}
            return self._go({"loaded": ["reset"]}, "reset", {"success": True})
        if path == "/update_weight_version":
            self.label = content["new_version"]
            return self._go({"reset": ["labelled"]}, "labelled", {"success": True})
        if path == "/resume":
            return self._go({"labelled": ["ready"]}, "ready", {"status": "resumed"})
        if path == "/pause?mode=abort":
            self._state = "paused"
            return 200, {"status": "paused"}
        return 404, {"error": f"no {path}"}

    def _started(self) -> tuple[int, Any]:
        if "weights" in self.asleep:
            return 500, {"error": "begun while its weights are asleep"}
        self._loading = {}
        return self._go({"paused": ["begun"]}, "begun", {"message": "started"})

    def _take(self, update: dict[str, Any]) -> tuple[int, Any]:
        piece = self.receive(update)
        self.pieces.append(list(piece))
        self._loading |= piece
        return self._go({"begun": ["taken"], "taken": ["taken"]}, "taken", {"message": "updated"})

    def _finished(self) -> tuple[int, Any]:
        self.loaded(self._loading)
        return self._go({"taken": ["loaded"]}, "loaded", {"message": "finished"})

    def receive(self, update: dict[str, Any]) -> dict[str, np.ndarray]:
        """Tensors of a piece, as the engine of transfer ``files`` gets them."""
        return load_file(update["path"])

    def loaded(self, tensors: dict[str, np.ndarray]) -> None:
        """Answer with these weights from now on."""
        self.table = tensors["table"].astype(np.float64)

    def logits(self, history: list[int]) -> np.ndarray:
        """Of the token after ``history``, float64 [V]."""
        return np.asarray(self.table[history[-1]])

    def _go(self, allowed: dict[str, list[str]], to: str, answer: Any) -> tuple[int, Any]:
        if to not in allowed.get(self._state, []):
            return 500, {"error": f"{to} after {self._state}"}
        self._state = to
        return 200, answer

    def _choice(self, prompt: list[int], sampling: dict[str, Any]) -> dict[str, Any]:
        draw = np.random.default_rng(sampling["seed"])
        history, tokens, content, reason = list(prompt), [], [], "length"
        for _ in range(sampling["max_tokens"]):
            time.sleep(self.seconds_per_token)
            logprobs = self._distribution(history, sampling)
            greedy = sampling["temperature"] == 0
            token = int(logprobs.argmax() if greedy else draw.choice(len(logprobs), p=np.exp(logprobs)))
            content.append(
                {
                    **{"token_id": token, "logprob": float(logprobs[token]), "rank": 1},
                    "top_logprobs": _likeliest(logprobs, token, sampling["logprobs"]),
                }
            )
            history.append(token)
            tokens.append(token)
            if token in sampling["stop_token_ids"]:
                reason = "stop"
                break
        return {
            "index": 0,
            "token_ids": tokens,
            "finish_reason": reason,
            "logprobs": {"content": content},
            "weight_versions": [{"version": self.label, "start": 0, "end": len(tokens)}],
        }

    def _distribution(self, history: list[int], sampling: dict[str, Any]) -> np.ndarray:
        """Log-probabilities of the next token, minus infinity where top-k and top-p leave none."""
        logprobs = processed(
            self.logits(history), history, sampling["repetition_penalty"], sampling["temperature"] or 1.0
        )
        return cut(logprobs, sampling.get("top_k", 0), sampling.get("top_p", 1.0))


def table_logprobs(table: Any, history: list[int], penalty: float, temperature: float) -> Any:
    """Log-probabilities of the next token, float64 [V]."""
    return processed(table[history[-1]], history, penalty, temperature)


def processed(logits: Any, history: list[int], penalty: float, temperature: float) -> Any:
    """Log-probabilities after repetition penalty and temperature, float64 [V]."""
    logits = np.array(logits, dtype=np.float64)
    seen = sorted(set(history))
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    logits = logits / temperature
    shifted = logits - logits.max()
    return shifted - np.log(np.exp(shifted).sum())


def cut(logprobs: np.ndarray, k: int, p: float) -> np.ndarray:
    """The ``k`` likeliest with ties, of these the fewest that reach ``p``; minus infinity for the others."""
    if k == 0 and p == 1:
        return logprobs
    if k:
        logprobs = np.where(logprobs >= np.sort(logprobs)[-k], logprobs, -np.inf)
        logprobs = logprobs - np.log(np.exp(logprobs).sum())
    order = np.argsort(logprobs)
    dropped = np.exp(logprobs[order]).cumsum() <= 1 - p
    dropped[-1] = False
    logprobs[order[dropped]] = -np.inf
    return np.asarray(logprobs - np.log(np.exp(logprobs).sum()))


def _likeliest(logprobs: np.ndarray, drawn: int, count: int) -> list[dict[str, Any]]:
    """The drawn token and the ``count`` likeliest, without a repetition; 0 asks for the drawn one alone."""
    tokens = dict.fromkeys([drawn, *np.argsort(-logprobs, kind="stable")[:count].tolist()])
    shown = list(tokens)[: max(count, 1)]
    return [{"token_id": token, "logprob": max(float(logprobs[token]), -9999.0)} for token in shown]


@contextmanager
def table_server(port: int = 0) -> Iterator[TableServer]:
    """One that listens within the block."""
    server = TableServer(port)
    try:
        yield server
    finally:
        server.close()
