"""``gapo-mega chat``: a conversation with one model, or with several side by side."""

from __future__ import annotations

import io
import logging
import math
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import Models, Overrides
from gapo_mega.files import local

if TYPE_CHECKING:
    from gapo_mega.config import Config
    from gapo_mega.engine.base import SamplingParameters

_LONGEST_ANSWER = 512


def chat(
    model: Models,
    overrides: Overrides = None,
    config: Annotated[
        Path | None,
        typer.Option(
            "--config",
            "-c",
            parser=local,
            metavar="PATH",
            help="YAML file of a run: its sampling, system prompt, dtype and seed, and its objectives.",
        ),
    ] = None,
    with_scores: Annotated[
        bool, typer.Option("--scores", help="Score every answer by the objectives of --config.")
    ] = False,
    system: Annotated[
        str | None, typer.Option(metavar="TEXT", help="System message. [data.system_prompt of --config]")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(min=1, help=f"Longest answer. [that of --config, or {_LONGEST_ANSWER}]")
    ] = None,
    temperature: Annotated[
        float | None,
        typer.Option(help="0: always the most likely token. [that of --config, or 1]"),
    ] = None,
    top_k: Annotated[int | None, typer.Option(min=0, help="[that of --config, or 0: all tokens]")] = None,
    top_p: Annotated[float | None, typer.Option(help="[that of --config, or 1]")] = None,
    repetition_penalty: Annotated[float | None, typer.Option(help="[that of --config, or 1: off]")] = None,
    seed: Annotated[int | None, typer.Option(help="Of sampling. [that of --config, or 1]")] = None,
    dtype: Annotated[
        str | None, typer.Option(metavar="fp32|bf16", help="[that of --config, or fp32]")
    ] = None,
    raw: Annotated[
        bool,
        typer.Option(
            "--raw",
            help="The text itself is the model's input, without template and history.",
        ),
    ] = False,
    as_json: Annotated[
        bool, typer.Option("--json", help="Over a pipe: an answer is a line of JSON with all that is known.")
    ] = False,
) -> None:
    """Talk with a model; with several --model, their answers stand side by side.

    At a terminal: /help lists the commands. Over a pipe every line is a message, and is answered before the
    next one is read. One process.
    """
    from rich.console import Console

    from gapo_mega.commands.chat_terminal import Screen, over_pipe
    from gapo_mega.planning import methods
    from gapo_mega.runs.chat import Chat, Manner
    from gapo_mega.runs.evaluated_models import find_models
    from gapo_mega.runs.processes import world_size

    if config is None and (with_scores or overrides):
        beside = "--scores" if with_scores else (overrides or [""])[0]
        raise ValueError(f"--config: found none beside {beside}, accepted: the YAML file of a run")
    if world_size() > 1:
        raise ValueError(f"chat: found {world_size()} processes of torchrun, accepted: one, without torchrun")
    settings = None if config is None else methods.load(config, overrides or [])
    manner = Manner(
        sampling=_sampling(settings, max_new_tokens, temperature, top_k, top_p, repetition_penalty),
        raw=raw or (settings is not None and not settings.data.chat_template),
        config=settings if with_scores else None,
        seed=seed if seed is not None else 1 if settings is None else settings.seed,
        dtype=_dtype(dtype, settings),
        system=system if system is not None or settings is None else settings.data.system_prompt,
    )
    named = find_models(model)
    launch.quiet_other_ranks()
    logging.getLogger("gapo_mega").setLevel(logging.WARNING)
    for stream in (sys.stdout, sys.stderr):
        _never_fail(stream)
    talk = Chat(named, manner)
    if sys.stdin.isatty() and sys.stdout.isatty() and not as_json:
        Screen(talk, Console()).run()
    else:
        over_pipe(talk, sys.stdin.buffer, sys.stdout, sys.stderr, as_json)
    talk.close()


def _sampling(
    settings: Config | None,
    max_new_tokens: int | None,
    temperature: float | None,
    top_k: int | None,
    top_p: float | None,
    penalty: float | None,
) -> SamplingParameters:
    """Those of the file, or the model's own distribution, with what the command line says otherwise."""
    from gapo_mega.engine.base import SamplingParameters

    base = (
        SamplingParameters(_LONGEST_ANSWER) if settings is None else SamplingParameters.of(settings.rollout)
    )
    found = SamplingParameters(
        max_new_tokens=base.max_new_tokens if max_new_tokens is None else max_new_tokens,
        temperature=base.temperature if temperature is None else temperature,
        top_k=base.top_k if top_k is None else top_k,
        top_p=base.top_p if top_p is None else top_p,
        repetition_penalty=base.repetition_penalty if penalty is None else penalty,
    )
    for option, value, fits, accepted in (
        ("--temperature", found.temperature, found.temperature >= 0, "0 (the most likely token) or more"),
        ("--top-p", found.top_p, 0 < found.top_p <= 1, "above 0, at most 1"),
        ("--repetition-penalty", found.repetition_penalty, found.repetition_penalty > 0, "above 0"),
    ):
        if not fits or value == math.inf:
            raise ValueError(f"{option}: found {value}, accepted: {accepted}")
    return found


def _dtype(given: str | None, settings: Config | None) -> Literal["fp32", "bf16"]:
    if given is None:
        return "fp32" if settings is None else settings.model.dtype
    if given not in ("fp32", "bf16"):
        raise ValueError(f"--dtype: found {given!r}, accepted: fp32, bf16")
    return "bf16" if given == "bf16" else "fp32"


def _never_fail(stream: object) -> None:
    """Let ``stream`` write "?" for what its encoding has not: a model may answer in any script."""
    if isinstance(stream, io.TextIOWrapper):
        stream.reconfigure(errors="replace")
