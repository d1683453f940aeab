"""The HTTP application of ``gapo-mega serve-reward``. Needs the ``serve`` extra."""

from __future__ import annotations

import logging

from fastapi import FastAPI, HTTPException, Request, Response
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse

from gapo_mega.commands.reward_limits import LARGEST_BODY, BodyLimit
from gapo_mega.commands.reward_protocol import Health, ScoreRequest, ScoreResponse, what_is_wrong
from gapo_mega.commands.reward_turns import BLOCKED_AFTER, Abandoned, Full, Turns
from gapo_mega.objectives import Objective
from gapo_mega.objectives.base import RewardFailed
from gapo_mega.types import well_formed

logger = logging.getLogger(__name__)


def create_app(objective: Objective, blocked_after: float = BLOCKED_AFTER) -> FastAPI:
    """An ASGI application that scores with ``objective``, one request at a time.

    ``POST /score`` answers 422 to a body that is no ``ScoreRequest``, and to what the objective refuses; 413
    to one of more than ``LARGEST_BODY`` bytes; 500 where the user's code fails, and 503 where too many wait:
    asking again may help. The answer's ``detail`` is one line. A request whose client has gone is dropped.
    """
    app = FastAPI(title=f"gapo-mega reward {objective.name}")
    app.add_middleware(BodyLimit, most=LARGEST_BODY)
    turns = Turns(blocked_after)

    @app.exception_handler(RequestValidationError)
    async def refuse(request: Request, error: RequestValidationError) -> JSONResponse:
        # Not FastAPI's own answer: it repeats the input, which JSON may not be able to hold.
        line = what_is_wrong(error.errors())
        logger.warning("refused: %s", line)
        return JSONResponse({"detail": line}, status_code=422)

    @app.get("/health", response_model_exclude_none=True)
    async def health(response: Response) -> Health:
        busy = turns.busy_seconds
        if busy is None:
            return Health(status="ok", objective=objective.name)
        response.status_code = 503 if turns.blocked else 200
        return Health(
            status="blocked" if turns.blocked else "busy",
            objective=objective.name,
            busy_seconds=round(busy, 1),
            waiting=turns.waiting,
        )

    @app.post("/score")
    async def score(content: ScoreRequest, request: Request) -> ScoreResponse:
        prompts = [sample.as_prompt(index) for index, sample in enumerate(content.samples)]
        responses = [sample.response for sample in content.samples]
        try:
            # In a thread, so that /health answers meanwhile.
            scores = await turns.run(lambda: objective.score(prompts, responses), request.is_disconnected)
        except Full as error:
            raise HTTPException(503, f"busy: {error}", {"Retry-After": "5"}) from None
        except Abandoned:
            logger.warning("dropped a request of %d samples whose client has gone", len(prompts))
            raise HTTPException(499, "the client has gone") from None
        except ValueError as error:
            logger.warning("refused: %s", _line(error))
            refused = not isinstance(error, RewardFailed) or error.refused
            # Where on this machine the user's code failed is for the log alone.
            said = error.reason if isinstance(error, RewardFailed) else error
            raise HTTPException(422 if refused else 500, _line(said)) from error
        return ScoreResponse(scores=scores)

    return app


def _line(said: object) -> str:
    return well_formed(" ".join(str(said).split()))
