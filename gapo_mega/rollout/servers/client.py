"""One vLLM server, as a client sees it. Written against vLLM 0.32."""

from __future__ import annotations

import json
import logging
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import inf
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

logger = logging.getLogger(__name__)

_LARGEST_ANSWER = 64 << 20  # bytes: log-probabilities of some 600,000 tokens
_BETWEEN_LOOKS = 1.0  # seconds
_SHORT = 10.0  # seconds that a question may take which needs no model
_LARGEST_SHORT = 1 << 20  # bytes of its answer
_SILENT, _BETWEEN_LINES = 30.0, 60.0  # seconds of a wait before the log says so, and says so again
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

    def __init__(self, url: str, patience: Patience, *, sleeps: bool = False) -> None:
        """``sleeps``: whether it may be asleep before an update."""
        self.url = url.rstrip("/")
        self._patience = patience
        self._sleeps = sleeps
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
        answer = self._decoded("/weight_info", self._get("/weight_info"))
        if not isinstance(answer, dict) or "weight_version" not in answer:
            raise self._odd("/weight_info", answer, "an object with weight_version")
        return str(answer["weight_version"])

    def begin(self, end: float) -> None:
        """Drop whatever is being answered, and prepare for new weights. ``end``: of ``time.monotonic``."""
        if self._sleeps:  # one that is awake says so in its log, and that is all
            self._post("/wake_up?tags=weights", {}, end)
        self._post("/pause?mode=abort", {}, end)
        self._post("/start_weight_update", {}, end)

    def take(self, update: Mapping[str, Any], end: float) -> None:
        """Load tensors, of which its transfer engine is told where they are and what."""
        self._post("/update_weights", {"update_info": update}, end)

    def finish(self, version: str, end: float) -> None:
        """Answer with the new weights from now on, and with nothing that was cached of the old ones."""
        self._post("/finish_weight_update", {}, end)
        if self._sleeps:
            self._post("/wake_up?tags=kv_cache", {}, end)
        answer = self._post("/reset_prefix_cache", {}, end)
        if not isinstance(answer, dict) or answer.get("success") is not True:
            raise self._odd("/reset_prefix_cache", answer, '{"success": true}')
        self._post("/update_weight_version", {"new_version": version}, end)
        self._post("/resume", {}, end)

    def world_size(self, end: float) -> int:
        """How many workers it has, each with a device of its own."""
        answer = self._decoded("/get_world_size", self._get("/get_world_size", end))
        if not isinstance(answer, dict) or type(answer.get("world_size")) is not int:
            raise self._odd("/get_world_size", answer, "an object with world_size")
        return int(answer["world_size"])

    def join(self, information: Mapping[str, Any], end: float) -> None:
        """Have its transfer engine meet the run's."""
        self._post("/init_weight_transfer_engine", {"init_info": information}, end)

    def leave(self, end: float) -> None:
        """Have its transfer engine let go of the run's."""
        self._post("/shutdown_weight_transfer_engine", {}, end)

    def sleep(self, end: float) -> None:
        """Free the memory of weights and cache, which are gone then; the next ``begin`` wakes it."""
        self._post("/sleep?level=2", {}, end)

    # -- whether it is there -----------------------------------------------------------------------
    def wait_until_up(self, check: Callable[[], None], seconds: float, begun: float | None = None) -> str:
        """Wait until it is healthy, and say which weights it has, as ``version``.

        ``check`` raises where there is nothing to wait for. Raises ``ServerLost`` ``seconds`` after ``begun``
        of ``time.monotonic``, which is now by default, and ``StoppedWaiting`` where the run is asked to stop.
        Says in the log that it waits.
        """
        begun = time.monotonic() if begun is None else begun
        line = begun + _SILENT
        while True:
            try:
                self._check_health()
                return self.version()
            except ServerLost as error:
                why = error
            check()
            now = time.monotonic()
            if now > begun + seconds:
                raise ServerLost(f"{self.url}: found no healthy vLLM server within {seconds:g} s") from why
            if now > line:
                logger.info(
                    "rank 0 waits for a healthy server: %s (%.0f s of %g s)", why, now - begun, seconds
                )
                line = now + _BETWEEN_LINES
            stopping.wait(_BETWEEN_LOOKS)

    def _check_health(self) -> None:
        answer = self._get("/health")
        if answer.status != 200:
            raise ServerLost(f"{self.url}/health: found status {answer.status}")

    # -- HTTP --------------------------------------------------------------------------------------
    def _again(self, ask: Callable[[], Any]) -> Any:
        """``ask``, repeated for as long as the server's absence is borne, which begins with the first loss.

        A server that lets a whole answer's time pass is not absent: it hangs.
        """
        end = inf
        while True:
            begun = time.monotonic()
            try:
                return ask()
            except ServerLost:
                now = time.monotonic()
                end = min(end, now + self._patience.absence)
                if self._given_up or now >= end or now - begun >= self._patience.answer:
                    raise
            stopping.wait(_BETWEEN_LOOKS)

    def _post(self, path: str, content: Any, end: float = inf) -> Any:
        """``end``: of ``time.monotonic``, where that comes before the limit of an answer."""
        limits = self._limits(path, self._patience.answer, _LARGEST_ANSWER, end)
        return self._decoded(
            path, self._answered(path, lambda url: limited_post(url, content, {}, limits, Route()))
        )

    def _get(self, path: str, end: float = inf) -> Answer:
        limits = self._limits(path, _SHORT, _LARGEST_SHORT, end)
        return self._answered(path, lambda url: limited_get(url, limits))

    def _limits(self, path: str, most: float, size: int, end: float) -> Limits:
        seconds = min(most, end - time.monotonic())
        if seconds <= 0:
            raise ServerLost(f"{self.url}{path}: found no time left for it within rollout.vllm.timeout")
        return Limits(seconds, seconds, size)

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
