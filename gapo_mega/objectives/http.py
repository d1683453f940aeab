"""An objective that is a service: it is sent conversations as JSON and answers scores (docs/rewards.md)."""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, ClassVar

import requests
from pydantic import Field, field_validator
from requests.adapters import HTTPAdapter
from requests.exceptions import InvalidHeader
from requests.utils import check_header_validity
from urllib3 import Retry
from urllib3.exceptions import MaxRetryError
from urllib3.util import parse_url

from gapo_mega.config import ObjectiveConfig, Section
from gapo_mega.objectives.base import ObjectiveKind
from gapo_mega.objectives.options import read_options
from gapo_mega.types import Prompt

Sample = dict[str, Any]

# Too many requests, and whatever may pass at the server.
_PASSING = frozenset({429, *range(500, 600)})
_FROM_ENVIRONMENT = "env:"
_EXCERPT = 200  # characters of an answer that an error shows


class HttpOptions(Section):
    """``options`` of kind ``http``."""

    url: str = Field(description="http:// or https:// address that samples are posted to")
    batch_size: int = Field(32, ge=1, description="samples of one request")
    concurrency: int = Field(4, ge=1, description="requests under way at once, from each data-parallel rank")
    timeout: float = Field(60.0, gt=0, description="seconds to wait for an answer, in each attempt")
    retries: int = Field(
        5, ge=0, description="further attempts after connection errors, timeouts, status 429 and 5xx"
    )
    backoff: float = Field(
        0.5,
        ge=0,
        description="the k-th retry waits backoff * 2^(k-1) seconds, 120 at most; the first does not wait",
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
        # A session of its own: they are not made to be shared between threads.
        with requests.Session() as session:
            for scheme in ("http://", "https://"):
                session.mount(scheme, HTTPAdapter(max_retries=self._retry()))
            try:
                answer = session.post(
                    self._options.url,
                    json={"samples": samples},
                    headers=self._headers,
                    timeout=self._options.timeout,
                    allow_redirects=False,  # a redirected POST would become a GET
                )
            except requests.RequestException as error:
                found, attempts = self._cause(error)
                raise self._failure(len(samples), attempts, found) from error
        attempts = 1 + len(answer.raw.retries.history)
        if answer.status_code != 200:
            raise self._failure(len(samples), attempts, f"status {answer.status_code} and {_excerpt(answer)}")
        return self._scores(answer, len(samples), attempts)

    def _cause(self, error: requests.RequestException) -> tuple[str, int]:
        """What kept an answer from coming, without the layers that the libraries put around it; attempts."""
        reason: object = error.args[0] if error.args else error
        attempts = 1
        if isinstance(reason, MaxRetryError):
            reason, attempts = reason.reason or reason, self._options.retries + 1
        return f"{type(reason).__name__} ({' '.join(str(reason).split())[:_EXCERPT]})", attempts

    def _retry(self) -> Retry:
        return Retry(
            total=self._options.retries,
            backoff_factor=self._options.backoff,
            status_forcelist=_PASSING,
            allowed_methods=["POST"],  # scoring changes nothing, so it can be asked for twice
            raise_on_status=False,
            respect_retry_after_header=True,
        )

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


def _sample(prompt: Prompt, response: str) -> Sample:
    messages = [dict(message) for message in prompt.answered(response)]
    return {"messages": messages, "prompt": prompt.text, "response": response}


def _excerpt(answer: requests.Response) -> str:
    """The beginning of an answer's body, on one line."""
    text = " ".join(answer.text.split())
    return repr(text if len(text) <= _EXCERPT else text[: _EXCERPT - 3] + "...")
