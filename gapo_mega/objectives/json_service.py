"""Services over HTTP that take and give JSON: attempts, waits, credentials, and errors of one line."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import requests
from pydantic import Field, field_validator
from requests.exceptions import ChunkedEncodingError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader as InvalidAnswerHeader
from urllib3.exceptions import LocationParseError, MaxRetryError
from urllib3.util import parse_url

from gapo_mega.config import Section
from gapo_mega.objectives.credentials import (
    ConfiguredOnly,
    Credentials,
    credential_in_query,
    without_password,
)

# Failures that may pass: too many requests, errors of the server; no connection, no answer, or half of one.
_PASSING_STATUS = frozenset({429, *range(500, 600)})
_PASSING_ERRORS = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError)
_LONGEST_WAIT = 120.0  # seconds before a retry, also where the service asks for more
_EXCERPT = 200  # characters of an answer that an error shows


class ServiceOptions(Section):
    """Where a service is, and how patiently it is asked."""

    url: str = Field(description="http:// or https:// address that is posted to")
    concurrency: int = Field(4, ge=1, description="requests under way at once, from each data-parallel rank")
    timeout: float = Field(
        60.0, gt=0, description="longest silence of the service in seconds, in each attempt"
    )
    retries: int = Field(
        5,
        ge=0,
        description="further attempts after connection errors, timeouts, cut answers, status 429, 5xx",
    )
    backoff: float = Field(
        0.5,
        ge=0,
        description="the k-th retry waits backoff * 2^(k-1) seconds, or what Retry-After says; 120 at most",
    )
    headers: dict[str, str] = Field(
        default_factory=dict,
        description="sent along; 'env:NAME' is the value of an environment variable, as credentials must be",
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if re.fullmatch(r"https?://[^\s/]+\S*", url) is None:
            found = without_password(url)
            raise ValueError(f"url: found {found!r}, accepted: http://HOST[:PORT]/PATH or https://...")
        try:
            auth = parse_url(url).auth
        except LocationParseError:
            raise ValueError(
                f"url: found {without_password(url)!r}, accepted: a host and a port of 0 to 65535"
            ) from None
        if auth is not None:  # the configuration is written to the run's folder
            raise ValueError("url: found a password in it, accepted: none (use headers with env:NAME)")
        parameter = credential_in_query(url)
        if parameter is not None:
            raise ValueError(
                f"url: found the parameter {parameter!r}, accepted: none that is a credential (use headers "
                "with env:NAME)"
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

    def post(self, content: Any, accepted: str) -> Reply:
        """What the service answers, after as many attempts as it takes.

        ``accepted``: what an error calls a right answer. Raises ``ValueError`` when the last attempt fails,
        and for another status than 200 and what is not JSON.
        """
        attempts = Retrying(
            retry=retry_if_exception_type(_Passing),  # scoring changes nothing, so asking twice is safe
            stop=stop_after_attempt(self._options.retries + 1),
            wait=self._seconds_to_wait,
            reraise=True,
        )
        try:
            answer = attempts(self._ask, content)
        except (_Passing, requests.RequestException) as error:
            found = error.found if isinstance(error, _Passing) else self._cause(error)
            raise self._failure(attempts.statistics["attempt_number"], found, accepted) from error
        count = attempts.statistics["attempt_number"]
        if answer.status_code != 200:
            found = f"status {answer.status_code} and {self._excerpt(answer)}"
            raise self._failure(count, found, accepted)
        try:
            decoded = answer.json()
        except (ValueError, RecursionError):
            found = f"what is not JSON: {self._excerpt(answer)}"
            raise self._failure(count, found, accepted) from None
        excerpt = self._excerpt(answer)
        return Reply(decoded, lambda what: self._failure(count, f"{what} in {excerpt}", accepted))

    def _ask(self, content: Any) -> requests.Response:
        """One attempt: an answer with all of its body, or ``_Passing``."""
        try:
            answer = requests.post(
                self._url,
                json=content,
                headers=self._credentials.headers,
                auth=ConfiguredOnly(),
                timeout=self._options.timeout,
                # A redirected POST would become a GET, and the headers are meant for this host alone.
                allow_redirects=False,
            )
        except _PASSING_ERRORS as error:
            raise _Passing(self._cause(error)) from error
        if answer.status_code in _PASSING_STATUS:
            raise _Passing(f"status {answer.status_code} and {self._excerpt(answer)}", _retry_after(answer))
        return answer

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome is not None else None
        asked = failure.seconds if isinstance(failure, _Passing) else 0.0
        backoff = wait_exponential(multiplier=self._options.backoff, max=_LONGEST_WAIT)(state)
        return min(max(asked, backoff), _LONGEST_WAIT)

    def _failure(self, attempts: int, found: str, accepted: str) -> ValueError:
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return self._error(
            f"{self._url}: found, after {times}, {found}; accepted: status 200 with {accepted}"
        )

    def _cause(self, error: requests.RequestException) -> str:
        """What kept an answer from coming, without the layers that the libraries put around it."""
        reason: object = error.args[0] if error.args else error
        if isinstance(reason, MaxRetryError):
            reason = reason.reason or reason
        return f"{type(reason).__name__} ({self._beginning(str(reason))})"

    def _excerpt(self, answer: requests.Response) -> str:
        """The beginning of an answer's body, on one line."""
        return repr(self._beginning(answer.text))

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
        self.found = found
        self.seconds = seconds


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the service asks to wait, 0 where it does not say."""
    try:
        return float(Retry().parse_retry_after(answer.headers["Retry-After"]))
    except (KeyError, InvalidAnswerHeader):
        return 0.0
