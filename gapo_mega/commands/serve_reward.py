"""``gapo-mega serve-reward``: an objective as a service for those of kind ``http`` (docs/rewards.md)."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.files import local


def serve_reward(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the objective, such as options.dtype=bf16."),
    ] = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config", "-c", parser=local, metavar="PATH", help="YAML file of one objective, of any kind."
        ),
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: directory or hub name of a classifier (kind hf_classifier).")
    ] = None,
    function: Annotated[str | None, typer.Option(help="Instead: module:function (kind python).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
    blocked_after: Annotated[
        float, typer.Option(min=0.1, help="Seconds of one request after which /health says blocked.")
    ] = 300.0,
) -> None:
    """Serve a reward over HTTP, for objectives of kind http of any training."""
    from gapo_mega.commands.reward_server import objective_config, serve

    logging.basicConfig(level=logging.WARNING)
    serve(objective_config(config, model, function, overrides or []), host, port, blocked_after)
