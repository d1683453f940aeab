"""An objective that is a service: it receives conversations as JSON and answers scores (docs/rewards.md)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import requests
from pydantic import Field, field_validator
from requests.exceptions import ChunkedEncodingError, InvalidHeader
from requests.utils import check_header_validity
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader as InvalidAnswerHeader
from urllib3.exceptions import MaxRetryError
from urllib3.util import parse_url

from gapo_mega.config import ObjectiveConfig, Section
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

Sample = dict[str, Any]

# Failures that may pass: too many requests, errors of the server; no connection, no answer, or half of one.
_PASSING_STATUS = frozenset({429, *range(500, 600)})
_PASSING_ERRORS = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError)
_LONGEST_WAIT = 120.0  # seconds before a retry, also where the service asks for more
_FROM_ENVIRONMENT = "env:"
_EXCERPT = 200  # characters of an answer that an error shows


class HttpOptions(Section):
    """``options`` of kind ``http``."""

    url: str = Field(description="http:// or https:// address that samples are posted to")
    batch_size: int = Field(32, ge=1, description="samples of one request")
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
        default_factory=dict, description="sent along; 'env:NAME' is the value of an environment variable"
    )

    @field_validator("url")
    @classmethod
    def _is_an_address(cls, url: str) -> str:
        if re.fullmatch(r"https?://[^\s/]+\S*", url) is None:
            raise ValueError(f"url: found {url!r}, accepted: http://HOST[:PORT]/PATH or https://...")
        if parse_url(url).auth is not None:  # the configuration is written to the run's folder
            raise ValueError("url: found a password in it, accepted: none (use headers with env:NAME)")
        return url


class Http(ObjectiveKind):
    """Scores that the service at ``options.url`` gives; nothing is sent before the first responses."""

    kind: ClassVar[str] = "http"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._options = read_options(config, HttpOptions)
        self._headers = {name: self._header(name, value) for name, value in self._options.headers.items()}

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        samples = [_sample(*pair) for pair in zip(prompts, responses, strict=True)]
        size = self._options.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        # map keeps the order; its first error cancels the requests that have not begun.
        with ThreadPoolExecutor(self._options.concurrency) as threads:
            return [score for scores in threads.map(self._post, batches) for score in scores]

    def _header(self, name: str, value: str) -> str:
        if value.startswith(_FROM_ENVIRONMENT):
            value = self._from_environment(name, value)
        try:
            check_header_validity((name, value))
        except InvalidHeader:  # whose message shows the value, which may be secret
            raise self._error(
                f"options: headers.{name}: found a name or value that HTTP does not allow, accepted: one "
                "line without spaces around it"
            ) from None
        return value

    def _from_environment(self, name: str, value: str) -> str:
        variable = value.removeprefix(_FROM_ENVIRONMENT)
        if variable not in os.environ:
            raise self._error(
                f"options: headers.{name}: found {value!r}, but the environment variable {variable!r} is not "
                "set; accepted: one that is"
            )
        return os.environ[variable]

    def _post(self, samples: list[Sample]) -> list[Any]:
        """The scores of one request. ``ValueError`` when the last attempt fails or answers something else."""
        attempts = Retrying(
            retry=retry_if_exception_type(_Passing),  # scoring changes nothing, so asking twice is safe
            stop=stop_after_attempt(self._options.retries + 1),
            wait=self._seconds_to_wait,
            reraise=True,
        )
        try:
            answer = attempts(self._ask, samples)
        except (_Passing, requests.RequestException) as error:
            found = error.found if isinstance(error, _Passing) else _cause(error)
            raise self._failure(len(samples), attempts.statistics["attempt_number"], found) from error
        count = attempts.statistics["attempt_number"]
        if answer.status_code != 200:
            raise self._failure(len(samples), count, f"status {answer.status_code} and {_excerpt(answer)}")
        return self._scores(answer, len(samples), count)

    def _ask(self, samples: list[Sample]) -> requests.Response:
        """One attempt: an answer with all of its body, or ``_Passing``."""
        try:
            answer = requests.post(
                self._options.url,
                json={"samples": samples},
                headers=self._headers,
                timeout=self._options.timeout,
                allow_redirects=False,  # a redirected POST would become a GET
            )
        except _PASSING_ERRORS as error:
            raise _Passing(_cause(error)) from error
        if answer.status_code in _PASSING_STATUS:
            raise _Passing(f"status {answer.status_code} and {_excerpt(answer)}", _retry_after(answer))
        return answer

    def _seconds_to_wait(self, state: RetryCallState) -> float:
        failure = state.outcome.exception() if state.outcome is not None else None
        asked = failure.seconds if isinstance(failure, _Passing) else 0.0
        backoff = wait_exponential(multiplier=self._options.backoff, max=_LONGEST_WAIT)(state)
        return min(max(asked, backoff), _LONGEST_WAIT)

    def _scores(self, answer: requests.Response, count: int, attempts: int) -> list[Any]:
        try:
            content = answer.json()
        except ValueError:
            raise self._failure(count, attempts, f"what is not JSON: {_excerpt(answer)}") from None
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise self._failure(count, attempts, f"no list of scores in {_excerpt(answer)}")
        if len(scores) != count:
            raise self._failure(count, attempts, f"{len(scores)} scores in {_excerpt(answer)}")
        return scores

    def _failure(self, count: int, attempts: int, found: str) -> ValueError:
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return self._error(
            f"{self._options.url}: found, after {times}, {found}; accepted: status 200 with "
            f'{{"scores": [...]}}, {count} numbers'
        )


class _Passing(Exception):
    """A failure that may pass: what was found, and how many seconds the service asks to wait."""

    def __init__(self, found: str, seconds: float = 0.0) -> None:
        super().__init__(found)
        self.found = found
        self.seconds = seconds


def _cause(error: requests.RequestException) -> str:
    """What kept an answer from coming, without the layers that the libraries put around it."""
    reason: object = error.args[0] if error.args else error
    if isinstance(reason, MaxRetryError):
        reason = reason.reason or reason
    return f"{type(reason).__name__} ({' '.join(str(reason).split())[:_EXCERPT]})"


def _retry_after(answer: requests.Response) -> float:
    """Seconds that the service asks to wait, 0 where it does not say."""
    try:
        return float(Retry().parse_retry_after(answer.headers["Retry-After"]))
    except (KeyError, InvalidAnswerHeader):
        return 0.0


def _sample(prompt: Prompt, response: str) -> Sample:
    messages = [dict(message) for message in prompt.answered(response)]
    return {"messages": messages, "prompt": prompt.text, "response": response}


def _excerpt(answer: requests.Response) -> str:
    """The beginning of an answer's body, on one line."""
    text = " ".join(answer.text.split())
    return repr(text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "...")
