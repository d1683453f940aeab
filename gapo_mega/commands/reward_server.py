"""The HTTP application of ``gapo-mega serve-reward``, and the server that runs it."""

from __future__ import annotations

import asyncio
import json
import logging
import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, model_validator

from gapo_mega import objectives, optional
from gapo_mega.config import ObjectiveConfig
from gapo_mega.config.loading import load, parse
from gapo_mega.objectives import Objective
from gapo_mega.objectives.hf_classifier import HfClassifier
from gapo_mega.types import Prompt, lone_surrogate, well_formed

if TYPE_CHECKING:
    from fastapi import FastAPI

logger = logging.getLogger(__name__)

LARGEST_BODY = 64 << 20  # bytes of a request
_NAME = "reward"  # of objectives that are given as --model or --function
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

    samples: list[Sample] = Field(min_length=1)


class ScoreResponse(BaseModel):
    """Answer of ``POST /score``: one finite number per sample, in order."""

    scores: list[float]


class Health(BaseModel):
    """Answer of ``GET /health``."""

    status: str
    objective: str


def objective_config(
    config: Path | None, model: str | None, function: str | None, overrides: Sequence[str]
) -> ObjectiveConfig:
    """The objective to serve: from a YAML file, a reward model's directory, or ``module:function``.

    ``overrides`` change its settings. Raises ``ValueError`` unless exactly one of the three is given.
    """
    given = [
        name for name, value in (("--config", config), ("--model", model), ("--function", function)) if value
    ]
    if len(given) != 1:
        raise ValueError(
            f"serve-reward: found {' and '.join(given) or 'no objective'}, accepted: one of --config, "
            "--model and --function"
        )
    if config is not None:
        return load(config, overrides, kind=ObjectiveConfig)
    data: dict[str, Any] = {"name": _NAME, "kind": "python", "function": function}
    if model is not None:
        data = {"name": _NAME, "kind": "hf_classifier", "options": {"model": model}}
    return parse(data, overrides, ObjectiveConfig, given[0])


def create_app(objective: Objective) -> FastAPI:
    """An ASGI application that scores with ``objective``, one request at a time.

    ``POST /score`` answers 422 to a body that is no ``ScoreRequest``, and to what the objective refuses; 413
    to one of more than ``LARGEST_BODY`` bytes. The answer's ``detail`` is one line.
    """
    from fastapi import FastAPI, HTTPException, Request
    from fastapi.concurrency import run_in_threadpool
    from fastapi.exceptions import RequestValidationError
    from fastapi.responses import JSONResponse

    app = FastAPI(title=f"gapo-mega reward {objective.name}")
    app.add_middleware(BodyLimit, most=LARGEST_BODY)
    one_at_a_time = asyncio.Lock()

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # Not FastAPI's own answer: it repeats the input, which JSON may not be able to hold.
        line = what_is_wrong(error.errors())
        logger.warning("refused: %s", line)
        return JSONResponse({"detail": line}, status_code=422)

    @app.get("/health")
    async def health() -> Health:
        return Health(status="ok", objective=objective.name)

    @app.post("/score")
    async def score(request: ScoreRequest) -> ScoreResponse:
        prompts = [sample.as_prompt(index) for index, sample in enumerate(request.samples)]
        responses = [sample.response for sample in request.samples]
        async with one_at_a_time:
            try:
                # In a thread, so that /health answers meanwhile.
                return ScoreResponse(scores=await run_in_threadpool(objective.score, prompts, responses))
            except ValueError as error:
                line = well_formed(" ".join(str(error).split()))
                logger.warning("refused: %s", line)
                raise HTTPException(422, line) from error

    return app


class BodyLimit:
    """ASGI middleware that stops reading a request's body after ``most`` bytes: status 413."""

    def __init__(self, app: Any, most: int) -> None:
        self._app = app
        self._most = most

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        from fastapi import HTTPException

        declared = dict(scope.get("headers", ())).get(b"content-length", b"")
        size = int(declared) if declared.isdigit() else 0
        read = 0

        async def limited() -> Any:
            nonlocal read
            message = await receive() if size <= self._most else {}
            read += len(message.get("body", b""))
            if max(read, size) > self._most:
                raise HTTPException(
                    413, f"body: found more than {self._most} bytes, accepted: fewer samples in a request"
                )
            return message

        await self._app(scope, limited, send)


def what_is_wrong(errors: Sequence[Any]) -> str:
    """One line for what FastAPI found wrong with a request: key and row, what was found, what is accepted."""
    first = errors[0]
    found, more = ascii(first["input"])[:_SHOWN], len(errors) - 1
    key = ".".join(str(part) for part in first["loc"] if part != "body") or "body"
    accepted = str(first["msg"]).removeprefix("Value error, ").removeprefix("Input should be ")
    if first["type"] == "json_invalid":
        key, accepted = "body", "JSON"
        found = f"{first['ctx']['error']} at character {first['loc'][-1]}"
    elif isinstance(first["input"], bytes):
        accepted = "JSON, with the header Content-Type: application/json"
    rest = f" (and {more} more)" if more else ""
    return f"{key}: found {found}, accepted: {' '.join(accepted.split())}{rest}"


def serve(config: ObjectiveConfig, host: str, port: int) -> None:
    """Serve the objective until interrupted, and print the address; port 0 takes a free one.

    It reads a reward model's weights first; requests that come meanwhile wait. Raises ``ValueError`` without
    the ``serve`` extra, for an address where it cannot listen, and for what the objective itself refuses.
    """
    probe = optional.serve()
    if not probe.usable:
        raise ValueError(
            f"serve-reward: found {probe.found}; run `pip install 'gapo-mega[serve]'` (lost without it: "
            f"{probe.lost})"
        )
    import uvicorn

    if config.outputs is not None:
        raise ValueError(
            f"serve-reward: found outputs {config.outputs}, accepted: name and output, one objective"
        )
    objective = objectives.build(config)
    if objective.wanted_model is not None:
        raise ValueError(
            f"serve-reward: found kind {config.kind}, which runs on the engine of a training; accepted: "
            "another kind"
        )
    if objective.reads_facts:
        raise ValueError(
            f"serve-reward: found {config.function}, which asks for token_counts or finished; accepted: a "
            "function of texts and columns (a request has nothing else)"
        )
    with _listening(host, port) as listener:
        if isinstance(objective, HfClassifier):
            objective.load()
        server = uvicorn.Server(uvicorn.Config(create_app(objective), log_level="warning"))
        address, bound = listener.getsockname()[:2]
        shown = f"[{address}]" if ":" in address else address
        print(f"objective {objective.name} is served at http://{shown}:{bound}/score", flush=True)
        server.run(sockets=[listener])


def _listening(host: str, port: int) -> socket.socket:
    """A listening socket, opened before the weights are read, so that a port in use fails at once."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        return socket.create_server((host, port), family=family)
    except OSError as error:
        reason = error.strerror or str(error)
        raise ValueError(
            f"--host, --port: found {host} and {port}: {reason}; accepted: an address of this machine and a "
            "free port, or 0"
        ) from error
