"""An objective that is a service: it receives conversations as JSON and answers scores (docs/rewards.md)."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import requests
from pydantic import Field, field_validator
from requests.exceptions import ChunkedEncodingError
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_attempt, wait_exponential
from urllib3 import Retry
from urllib3.exceptions import InvalidHeader as InvalidAnswerHeader
from urllib3.exceptions import LocationParseError, MaxRetryError
from urllib3.util import parse_url

from gapo_mega.config import ObjectiveConfig, Section
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.objectives.credentials import (
    ConfiguredOnly,
    Credentials,
    credential_in_query,
    without_password,
)
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

Sample = dict[str, Any]

# Failures that may pass: too many requests, errors of the server; no connection, no answer, or half of one.
_PASSING_STATUS = frozenset({429, *range(500, 600)})
_PASSING_ERRORS = (requests.ConnectionError, requests.Timeout, ChunkedEncodingError)
_LONGEST_WAIT = 120.0  # seconds before a retry, also where the service asks for more
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


class Http(ObjectiveKind):
    """Scores that the service at ``options.url`` gives; nothing is sent before the first responses."""

    kind: ClassVar[str] = "http"

    def __init__(self, config: ObjectiveConfig) -> None:
        super().__init__(config)
        self._options = read_options(config, HttpOptions, with_columns=True)
        self._credentials = Credentials(self._options.headers, self._error)

    def evaluate(self, prompts: Sequence[Prompt], responses: Sequence[str]) -> list[Any]:
        samples = [self._sample(*pair) for pair in zip(prompts, responses, strict=True)]
        size = self._options.batch_size
        batches = [samples[start : start + size] for start in range(0, len(samples), size)]
        # map keeps the order; its first error cancels the requests that have not begun.
        with ThreadPoolExecutor(self._options.concurrency) as threads:
            answered = [score for scores in threads.map(self._post, batches) for score in scores]
        return [self._json_number(index, score) for index, score in enumerate(answered)]

    def check_prompts(self, prompts: Sequence[Prompt]) -> None:
        for prompt in prompts:
            for column in self.config.columns:
                try:
                    json.dumps(prompt.columns[column], allow_nan=False)
                except (TypeError, ValueError, RecursionError) as error:
                    found = " ".join(repr(prompt.columns[column]).split())[:_EXCERPT]
                    raise self._error(
                        f"columns: found {found} in column {column!r} of prompt {prompt.index}, accepted: "
                        f"what JSON can hold ({error})"
                    ) from None

    def _sample(self, prompt: Prompt, response: str) -> Sample:
        messages = [dict(message) for message in prompt.answered(response)]
        sample: Sample = {"messages": messages, "prompt": prompt.text, "response": response}
        if self.config.columns:
            sample["columns"] = {column: prompt.columns[column] for column in self.config.columns}
        return sample

    def _json_number(self, index: int, score: Any) -> Any:
        """``score``, unless Python would take for a number what JSON does not, or double precision cannot."""
        too_large = isinstance(score, int) and abs(score) > sys.float_info.max
        if isinstance(score, bool) or too_large:
            shown = json.dumps(score)[:_EXCERPT]
            raise self._error(f"found the score {shown} for response {index}, accepted: a finite number")
        return score

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
            found = error.found if isinstance(error, _Passing) else self._cause(error)
            raise self._failure(len(samples), attempts.statistics["attempt_number"], found) from error
        count = attempts.statistics["attempt_number"]
        if answer.status_code != 200:
            found = f"status {answer.status_code} and {self._excerpt(answer)}"
            raise self._failure(len(samples), count, found)
        return self._scores(answer, len(samples), count)

    def _ask(self, samples: list[Sample]) -> requests.Response:
        """One attempt: an answer with all of its body, or ``_Passing``."""
        try:
            answer = requests.post(
                self._options.url,
                json={"samples": samples},
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

    def _scores(self, answer: requests.Response, count: int, attempts: int) -> list[Any]:
        try:
            content = answer.json()
        except (ValueError, RecursionError):
            raise self._failure(count, attempts, f"what is not JSON: {self._excerpt(answer)}") from None
        scores = content.get("scores") if isinstance(content, dict) else None
        if not isinstance(scores, list):
            raise self._failure(count, attempts, f"no list of scores in {self._excerpt(answer)}")
        if len(scores) != count:
            raise self._failure(count, attempts, f"{len(scores)} scores in {self._excerpt(answer)}")
        return scores

    def _failure(self, count: int, attempts: int, found: str) -> ValueError:
        times = "1 attempt" if attempts == 1 else f"{attempts} attempts"
        return self._error(
            f"{self._options.url}: found, after {times}, {found}; accepted: status 200 with "
            f'{{"scores": [...]}}, {count} numbers'
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
