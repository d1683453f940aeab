"""What ``gapo-mega serve-reward`` takes and answers: bodies of requests, and what is wrong with one."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Annotated, Any, Literal

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, model_validator

from gapo_mega.types import Prompt, lone_surrogate

MOST_SAMPLES = 4096  # of a request
_SHOWN = 60  # characters of a value that a refusal repeats


def _utf8(text: str) -> str:
    """JSON's escapes can spell half a character, which no tokenizer and no file takes."""
    place = lone_surrogate(text)
    if place is not None:
        raise ValueError(f"text without lone surrogates (there is one at character {place})")
    return text


def _utf8_within(values: dict[str, Any]) -> dict[str, Any]:
    _utf8(json.dumps(values, ensure_ascii=False))
    return values


Text = Annotated[str, AfterValidator(_utf8)]


class ChatMessage(BaseModel):
    """One turn."""

    model_config = ConfigDict(extra="forbid")

    role: Text
    content: Text


class Sample(BaseModel):
    """A response to score. Without ``messages`` the conversation is ``prompt`` and ``response``.

    ``columns`` holds the row's columns that the objective reads.
    """

    model_config = ConfigDict(extra="forbid")

    prompt: Text
    response: Text
    messages: list[ChatMessage] | None = None
    columns: Annotated[dict[str, Any], AfterValidator(_utf8_within)] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _ends_with_the_response(self) -> Sample:
        if self.messages is not None:
            last = self.messages[-1] if self.messages else None
            if last is None or (last.role, last.content) != ("assistant", self.response):
                raise ValueError("messages that end with the response, said by assistant")
        return self

    def as_prompt(self, index: int) -> Prompt:
        """The prompt that the response answers."""
        asked = [message.model_dump() for message in (self.messages or [])[:-1]]
        return Prompt(index, self.prompt, messages=tuple(asked), columns=self.columns)


class ScoreRequest(BaseModel):
    """Body of ``POST /score``."""

    model_config = ConfigDict(extra="forbid")

    samples: list[Sample] = Field(min_length=1, max_length=MOST_SAMPLES)


class ScoreResponse(BaseModel):
    """Answer of ``POST /score``: one finite number per sample, in order."""

    scores: list[float]


class Health(BaseModel):
    """Answer of ``GET /health``; the last two while a request is scored.

    ``blocked``: for longer than the service was told, so that it takes no others; status 503.
    """

    status: Literal["ok", "busy", "blocked"]
    objective: str
    busy_seconds: float | None = None
    waiting: int | None = None


class Unreadable(ValueError):
    """A body that no JSON can be read from: no UTF-8, too deep, or a number of too many digits."""


def read_request(body: bytes, content_type: str) -> ScoreRequest:
    """What a body asks for. Takes up to forty times its bytes of memory.

    Raises ``ValueError`` with one line: key and row, what was found, what is accepted; or ``Unreadable``.
    """
    kind = content_type.partition(";")[0].strip().lower()
    content: object = body or None
    if body and (kind in ("", "application/json") or kind.endswith("+json")):
        content = _json(body)
    try:
        return ScoreRequest.model_validate(content, from_attributes=True)
    except ValidationError as error:
        line = _what_is_wrong(error.errors(include_url=False))
    raise ValueError(line)  # not within: the error would keep the content


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except json.JSONDecodeError as error:
        raise ValueError(f"body: found {error.msg} at character {error.pos}, accepted: JSON") from None
    except (ValueError, RecursionError):
        raise Unreadable("body: found an error in parsing the body, accepted: JSON in UTF-8") from None


def _what_is_wrong(errors: Sequence[Any]) -> str:
    """One line for the first fault of a request, and how many more there are."""
    first = errors[0]
    found, more = ascii(first["input"])[:_SHOWN], len(errors) - 1
    key = ".".join(map(str, first["loc"])) or "body"
    accepted = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if isinstance(first["input"], bytes):
        accepted = "JSON, with the header Content-Type: application/json"
    rest = f" (and {more} more)" if more else ""
    return f"{key}: found {found}, accepted: {' '.join(accepted.split())}{rest}"
