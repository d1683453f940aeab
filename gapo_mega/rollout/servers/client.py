"""One vLLM server, as a client sees it. Written against vLLM 0.32."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import requests

from gapo_mega import stopping
from gapo_mega.objectives.limited_request import (
    Answer,
    Limits,
    NotTaken,
    NotWhole,
    Route,
    limited_get,
    limited_post,
)
from gapo_mega.rollout.servers.lost import ServerLost

_LARGEST_ANSWER = 64 << 20  # bytes: log-probabilities of some 600,000 tokens
_BETWEEN_LOOKS = 1.0  # seconds
_SHORT = 10.0  # seconds that a question may take which needs no model
_LARGEST_SHORT = 1 << 20  # bytes of its answer
_EXCERPT = 300  # characters of an answer that an error shows


@dataclass(frozen=True)
class Patience:
    """Seconds: for an answer, for a server that does not answer, and for one that starts."""

    answer: float
    absence: float
    start: float


class VllmServer:
    """The HTTP API of the server at ``url``. Safe to use from several threads.

    All methods raise ``ServerLost`` where there is no answer, or one that says that the server has failed,
    and ``ValueError`` where the server refuses the question.
    """

    def __init__(self, url: str, patience: Patience) -> None:
        self.url = url.rstrip("/")
        self._patience = patience
        self._given_up = False

    def give_up(self) -> None:
        """Ask nothing a second time from now on."""
        self._given_up = True

    # -- answering ---------------------------------------------------------------------------------
    def generate(self, token_ids: list[int], sampling: Mapping[str, Any]) -> Mapping[str, Any]:
        """The one choice of ``/inference/v1/generate``: ``token_ids``, ``logprobs``, ``weight_versions``.

        Asked again while the server is not there: a response has its own seed.
        """
        content = {"token_ids": token_ids, "sampling_params": dict(sampling)}
        answer = self._again(lambda: self._post("/inference/v1/generate", content))
        try:
            (choice,) = answer["choices"]
        except (TypeError, KeyError, ValueError):
            raise self._odd("/inference/v1/generate", answer, "an object with one choice") from None
        return dict(choice)

    # -- weights -----------------------------------------------------------------------------------
    def version(self) -> str:
        """The label of the weights, as ``finish`` gave it last."""
        answer = self._again(lambda: self._decoded("/weight_info", self._get("/weight_info")))
        if not isinstance(answer, dict) or "weight_version" not in answer:
            raise self._odd("/weight_info", answer, "an object with weight_version")
        return str(answer["weight_version"])

    def begin(self) -> None:
        """Drop whatever is being answered, and prepare for new weights."""
        self._post("/pause?mode=abort", {})
        self._rpc("gapo_begin_update")

    def take(self, path: str) -> None:
        """Load the tensors of a safetensors file that the server can read."""
        self._rpc("gapo_take_weights", path)

    def finish(self, version: str) -> None:
        """Answer with the new weights from now on, and with nothing that was cached of the old ones."""
        self._rpc("gapo_finish_update")
        answer = self._post("/reset_prefix_cache", {})
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise self._odd("/reset_prefix_cache", answer, '{"success": true}')
        self._post("/update_weight_version", {"new_version": version})
        self._post("/resume", {})

    # -- whether it is there -----------------------------------------------------------------------
    def is_up(self) -> bool:
        """Whether it says that it is healthy. Never raises."""
        with suppress(ServerLost):
            return self._get("/health").status == 200
        return False

    def wait_until_up(self, check: Callable[[], None], seconds: float) -> None:
        """Wait until it is healthy; ``check`` raises where there is nothing to wait for.

        Raises ``ServerLost`` after ``seconds``, and ``StoppedWaiting`` where the run is asked to stop.
        """
        end = time.monotonic() + seconds
        while not self.is_up():
            check()
            if time.monotonic() > end:
                raise ServerLost(f"{self.url}: found no healthy vLLM server within {seconds:g} s")
            stopping.wait(_BETWEEN_LOOKS)

    # -- HTTP --------------------------------------------------------------------------------------
    def _rpc(self, method: str, *arguments: str) -> None:
        self._post("/collective_rpc", {"method": method, "args": list(arguments)})

    def _again(self, ask: Callable[[], Any]) -> Any:
        """``ask``, repeated for as long as the server's absence is borne."""
        end = time.monotonic() + self._patience.absence
        while True:
            try:
                return ask()
            except ServerLost:
                if self._given_up or time.monotonic() > end:
                    raise
            stopping.wait(_BETWEEN_LOOKS)

    def _post(self, path: str, content: Any) -> Any:
        limits = Limits(self._patience.answer, self._patience.answer, _LARGEST_ANSWER)
        return self._decoded(
            path, self._answered(path, lambda url: limited_post(url, content, {}, limits, Route()))
        )

    def _get(self, path: str) -> Answer:
        limits = Limits(_SHORT, _SHORT, _LARGEST_SHORT)
        return self._answered(path, lambda url: limited_get(url, limits))

    def _answered(self, path: str, ask: Callable[[str], Answer]) -> Answer:
        try:
            return ask(self.url + path)
        except (NotWhole, NotTaken, requests.RequestException) as error:
            raise ServerLost(f"{self.url}{path}: found no answer: {_line(str(error))}") from error

    def _decoded(self, path: str, answer: Answer) -> Any:
        text = _line(answer.body.decode("utf-8", errors="replace"))
        if 400 <= answer.status < 500 and answer.status != 429:
            raise ValueError(f"{self.url}{path}: found status {answer.status} and {text!r}, accepted: 200")
        if answer.status != 200:
            raise ServerLost(f"{self.url}{path}: found status {answer.status} and {text!r}")
        if not answer.body:
            return None
        try:
            return json.loads(answer.body)
        except (ValueError, RecursionError):
            raise ServerLost(f"{self.url}{path}: found what is not JSON: {text!r}") from None

    def _odd(self, path: str, answer: Any, accepted: str) -> ServerLost:
        return ServerLost(f"{self.url}{path}: found {_line(repr(answer))}, accepted: {accepted}")


def _line(text: str) -> str:
    """The beginning of ``text`` on one line."""
    text = " ".join(text.split())
    return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."
