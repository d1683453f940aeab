"""The server of ``gapo-mega serve-reward``: which objective it serves, and where it listens."""

from __future__ import annotations

import socket
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from gapo_mega import objectives, optional
from gapo_mega.commands.reward_limits import LARGEST_BODY, BodyLimit, impatient_protocol
from gapo_mega.commands.reward_protocol import ScoreRequest, ScoreResponse
from gapo_mega.commands.reward_turns import BLOCKED_AFTER
from gapo_mega.config import ObjectiveConfig
from gapo_mega.config.loading import load, parse
from gapo_mega.objectives import Objective
from gapo_mega.objectives.hf_classifier import HfClassifier

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = [
    "LARGEST_BODY",
    "BodyLimit",
    "ScoreRequest",
    "ScoreResponse",
    "create_app",
    "objective_config",
    "serve",
    "server_of",
]

STOP_WITHIN = 10  # seconds that SIGTERM leaves to what is under way
_NAME = "reward"  # of objectives that are given as --model or --function


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


def create_app(objective: Objective, blocked_after: float = BLOCKED_AFTER) -> FastAPI:
    """The application that scores with ``objective``; see ``reward_app``, which needs the extra."""
    from gapo_mega.commands.reward_app import create_app as create

    return create(objective, blocked_after)


def server_of(app: FastAPI) -> uvicorn.Server:
    """The server of an application: bounded in connections, in waiting for clients, and in its end."""
    import uvicorn

    config = uvicorn.Config(
        app,
        log_level="warning",
        http=impatient_protocol(),
        timeout_graceful_shutdown=STOP_WITHIN,
    )
    return uvicorn.Server(config)


def serve(config: ObjectiveConfig, host: str, port: int, blocked_after: float = BLOCKED_AFTER) -> None:
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
        server = server_of(create_app(objective, blocked_after))
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
