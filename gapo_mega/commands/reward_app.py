"""The HTTP application of ``gapo-mega serve-reward``. Needs the ``serve`` extra."""

from __future__ import annotations

import logging

from fastapi import FastAPI, HTTPException, Request, Response
from starlette.requests import ClientDisconnect

from gapo_mega.commands.reward_limits import LARGEST_BODY, BodyLimit
from gapo_mega.commands.reward_protocol import Health, ScoreResponse, Unreadable, read_request
from gapo_mega.commands.reward_turns import BLOCKED_AFTER, Abandoned, Full, Turns
from gapo_mega.objectives import Objective
from gapo_mega.objectives.base import RewardFailed
from gapo_mega.types import well_formed

logger = logging.getLogger(__name__)


def create_app(objective: Objective, blocked_after: float = BLOCKED_AFTER) -> FastAPI:
    """An ASGI application that reads and scores with ``objective``, one request at a time.

    ``POST /score`` answers 422 to a body that is no ``ScoreRequest``, and to what the objective refuses; 400
    to what is no JSON in UTF-8; 413 to one of more than ``LARGEST_BODY`` bytes; 500 where the user's code
    fails, and 503 where too many wait: asking again may help. The answer's ``detail`` is one line. A request
    whose client has gone is dropped.
    """
    app = FastAPI(title=f"gapo-mega reward {objective.name}")
    app.add_middleware(BodyLimit, most=LARGEST_BODY)
    turns = Turns(blocked_after)

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

    def scores_of(body: bytes, content_type: str) -> list[float]:
        content = read_request(body, content_type)
        prompts = [sample.as_prompt(index) for index, sample in enumerate(content.samples)]
        return objective.score(prompts, [sample.response for sample in content.samples])

    @app.post("/score")
    async def score(request: Request) -> ScoreResponse:
        try:
            body = await request.body()
            content_type = request.headers.get("content-type", "")
            # In a thread, so that /health answers meanwhile, and read in its turn: as Python objects a body
            # takes many times its bytes.
            scores = await turns.run(lambda: scores_of(body, content_type), request.is_disconnected)
        except Full as error:
            raise HTTPException(503, f"busy: {error}", {"Retry-After": "5"}) from None
        except (Abandoned, ClientDisconnect):
            logger.warning("dropped a request whose client has gone")
            raise HTTPException(499, "the client has gone") from None
        except ValueError as error:
            logger.warning("refused: %s", _line(error))
            # Where on this machine the user's code failed is for the log alone.
            said = error.reason if isinstance(error, RewardFailed) else error
            raise HTTPException(_status(error), _line(said)) from error
        return ScoreResponse(scores=scores)

    return app


def _status(error: ValueError) -> int:
    if isinstance(error, Unreadable):
        return 400
    return 500 if isinstance(error, RewardFailed) and not error.refused else 422


def _line(said: object) -> str:
    return well_formed(" ".join(str(said).split()))
