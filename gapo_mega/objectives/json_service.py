"""Services over HTTP that take and give JSON: attempts, waits, credentials, and errors of one line."""

from __future__ import annotations

import json
import logging
import os
import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests
from pydantic import Field, field_validator
from tenacity import RetryCallState, Retrying, retry_if_exception_type, wait_exponential
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader as InvalidAnswerHeader
from urllib3.exceptions import LocationParseError, MaxRetryError
from urllib3.util import parse_url

from gapo_mega import stopping
from gapo_mega.config import LocalPath, Section
from gapo_mega.credentials import credential_in_query
from gapo_mega.files import local
from gapo_mega.objectives.credentials import Credentials
from gapo_mega.objectives.limited_request import Answer, Limits, NotTaken, NotWhole, Route, limited_post
from gapo_mega.option_checks import shown, without_password

logger = logging.getLogger(__name__)

# Failures that may pass: too many requests, errors of the server; no connection, no answer, or half of one.
_PASSING_STATUS = frozenset({429, *range(500, 600)})
_PASSING_ERRORS = (requests.ConnectionError, requests.Timeout)
LARGEST_ANSWER = 8 << 20  # bytes, once decompressed: some 400,000 scores
_LONGEST_WAIT = 120.0  # seconds before a retry, also where the service asks for more
_SHORTEST_WAIT = 0.01  # without a backoff, a service that is down would be asked without a pause
TO_END = 10.0  # seconds that a request under way has once the run is asked to stop
_EXCERPT = 200  # characters of an answer that an error shows


class ServiceOptions(Section):
    """Where a service is, and how patiently it is asked."""

    url: str = Field(description="http:// or https:// address that is posted to")
    concurrency: int = Field(4, ge=1, description="requests under way at once, from each data-parallel rank")
    timeout: float = Field(
        60.0, gt=0, description="longest silence of the service in seconds, in each attempt"
    )
    total_timeout: float = Field(
        600.0, gt=0, description="longest time of an attempt in seconds, from the request to the last byte"
    )
    patience: float = Field(
        300.0,
        ge=0,
        description="for how many seconds a request is tried again after connection errors, timeouts, cut "
        "answers, status 429, 5xx",
    )
    retries: int | None = Field(
        None, ge=0, description="further attempts at most, within patience; none: as many as it has time for"
    )
    backoff: float = Field(
        0.5,
        ge=0,
        description="the k-th retry waits backoff * 2^(k-1) seconds, or what Retry-After says; 120 at most",
    )
    headers: dict[str, str] = Field(
        default_factory=dict,
        description="sent along; 'env:NAME' is the value of an environment variable and 'file:PATH' the text "
        "of a file, as credentials must be",
    )
    proxy: str | None = Field(
        None,
        description="http://HOST:PORT to go through, or 'env:NAME' or 'file:PATH' that holds one; none: "
        "straight, whatever the environment says",
    )
    certificates: LocalPath | None = Field(
        None, description="PEM file of the authorities that https trusts; none: the usual ones"
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        found = shown(without_password(url), _EXCERPT)
        if re.fullmatch(r"https?://[^\s/]+\S*", url) is None:
            raise ValueError(f"url: found {found}, accepted: http://HOST[:PORT]/PATH or https://...")
        try:
            auth = parse_url(url).auth
        except LocationParseError:
            raise ValueError(f"url: found {found}, accepted: a host and a port of 0 to 65535") from None
        if auth is not None:  # the configuration is written to the run's folder
            raise ValueError(
                "url: found a password in it, accepted: none (use headers with env:NAME or file:PATH)"
            )
        parameter = credential_in_query(url)
        if parameter is not None:
            raise ValueError(
                f"url: found the parameter {parameter!r}, accepted: none that is a credential (use headers "
                "with env:NAME or file:PATH)"
            )
        return url


class JsonService:
    """Posts JSON; nothing is sent before the first ``post``.

    Args:
        options: of the service.
        error: makes a ``ValueError`` of a message, such as one that begins with the objective's name.
        path: to add to ``options.url``.
    """

    def __init__(self, options: ServiceOptions, error: Callable[[str], ValueError], path: str = "") -> None:
        self._options = options
        self._url = options.url.rstrip("/") + path if path else options.url
        self._error = error
        self._credentials = Credentials(options.headers, error)
        self._limits = Limits(options.timeout, options.total_timeout, LARGEST_ANSWER, TO_END)
        self._route = Route(self._credentials.proxy(options.proxy), self._certificates())

    def post(self, content: Any, accepted: str) -> Reply:
        """What the service answers, after as many attempts as it takes and ``patience`` allows.

        ``accepted``: what an error calls a right answer. Raises ``ValueError`` when the last attempt fails,
        and for another status than 200, what is not JSON and what is too large. Says in the log for how long
        it waits. Raises ``StoppedWaiting`` where the run is asked to stop meanwhile.
        """
        begun = time.monotonic()
        attempts = Retrying(
            retry=retry_if_exception_type(_Passing),  # scoring changes nothing, so asking twice is safe
            stop=self._is_over,
            wait=self._seconds_to_wait,
            before_sleep=self._tell,
            sleep=stopping.wait,
            reraise=True,
        )
        try:
            answer = attempts(self._ask, content)
        except (_Passing, NotTaken, requests.RequestException) as error:
            found = self._cause(error) if isinstance(error, requests.RequestException) else str(error)
            raise self._failure(attempts, begun, found, accepted) from error
        if answer.status != 200:
            found = f"status {answer.status} and {self._excerpt(answer)}"
            raise self._failure(attempts, begun, found, accepted)
        try:
            decoded = json.loads(answer.body)
        except (ValueError, RecursionError):
            found = f"what is not JSON: {self._excerpt(answer)}"
            raise self._failure(attempts, begun, found, accepted) from None
        excerpt = self._excerpt(answer)
        return Reply(decoded, lambda what: self._failure(attempts, begun, f"{what} in {excerpt}", accepted))

    def _certificates(self) -> str | None:
        if self._options.certificates is None:
            return None
        path = local(self._options.certificates)
        if not os.path.isfile(path):
            raise self._error(f"options: certificates: file {path} not found, accepted: a PEM file")
        return str(path)

    def _ask(self, content: Any) -> Answer:
        """One attempt: an answer with all of its body, or ``_Passing``."""
        try:
            answer = limited_post(self._url, content, self._credentials.headers, self._limits, self._route)
        except NotWhole as error:
            raise _Passing(self._beginning(str(error))) from error
        except _PASSING_ERRORS as error:
            raise _Passing(self._cause(error)) from error
        if answer.status in _PASSING_STATUS:
            raise _Passing(f"status {answer.status} and {self._excerpt(answer)}", _retry_after(answer))
        return answer

    def _is_over(self, state: RetryCallState) -> bool:
        retries = self._options.retries
        waited = state.seconds_since_start or 0.0
        return waited >= self._options.patience or (retries is not None and state.attempt_number > retries)

    def _tell(self, state: RetryCallState) -> None:
        failure = state.outcome.exception() if state.outcome is not None else None
        logger.warning(
            "%s: %s; asks again in %.3g s, has waited %.0f s of %g s (patience)",
            without_password(self._url),
            failure,
            state.upcoming_sleep,
            state.seconds_since_start or 0.0,
            self._options.patience,
        )

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome is not None else None
        asked = failure.seconds if isinstance(failure, _Passing) else 0.0
        backoff = wait_exponential(multiplier=self._options.backoff, max=_LONGEST_WAIT)(state)
        left = self._options.patience - (state.seconds_since_start or 0.0)
        return max(0.0, min(max(asked, backoff, _SHORTEST_WAIT), _LONGEST_WAIT, left))

    def _failure(self, attempts: Retrying, begun: float, found: str, accepted: str) -> ValueError:
        count = attempts.statistics["attempt_number"]
        times = "1 attempt" if count == 1 else f"{count} attempts"
        seconds = time.monotonic() - begun
        within = f" in {seconds:.0f} s" if count > 1 and seconds >= 1 else ""
        return self._error(
            f"{self._url}: found, after {times}{within}, {found}; accepted: status 200 with {accepted}"
        )

    def _cause(self, error: requests.RequestException) -> str:
        """What kept an answer from coming, without the layers that the libraries put around it."""
        reason: object = error.args[0] if error.args else error
        if isinstance(reason, MaxRetryError):
            reason = reason.reason or reason
        return f"{type(reason).__name__} ({self._beginning(str(reason))})"

    def _excerpt(self, answer: Answer) -> str:
        """The beginning of an answer's body, on one line."""
        return repr(self._beginning(answer.body.decode("utf-8", errors="replace")))

    def _beginning(self, text: str) -> str:
        # Hidden first: a cut in the middle of a credential would leave half of it.
        text = self._credentials.hidden(" ".join(text.split()))
        return text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "..."


@dataclass(frozen=True)
class Reply:
    """What a service answered, decoded; ``fault`` makes the error that says what is wrong with it."""

    content: Any
    fault: Callable[[str], ValueError]


class _Passing(Exception):
    """A failure that may pass: what was found, and how many seconds the service asks to wait."""

    def __init__(self, found: str, seconds: float = 0.0) -> None:
        super().__init__(found)
        self.seconds = seconds


def _retry_after(answer: Answer) -> float:
    """Seconds that the service asks to wait, 0 where it does not say."""
    try:
        return float(Retry().parse_retry_after(answer.headers["Retry-After"]))
    except (KeyError, InvalidAnswerHeader):
        return 0.0
