"""What several commands take on their command lines."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.files import local

ConfigFile = Annotated[
    Path, typer.Option("--config", "-c", parser=local, metavar="PATH", help="YAML file of the run.")
]
Models = Annotated[
    list[str],
    typer.Option(
        "--model",
        metavar="[NAME=]PATH",
        help="Hugging Face directory or hub name, Megatron checkpoint, or run directory; once a model.",
    ),
]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Start this many local processes. Not inside torchrun.")
]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Remove what an earlier run wrote in output_dir, and begin anew."),
]
DryRun = Annotated[
    bool,
    typer.Option("--dry-run", help="Check the data's first rows; print configuration and layout; stop."),
]
World = Annotated[int | None, typer.Option(min=1, help="With --dry-run: number of processes to plan for.")]
OVERWRITE = "--overwrite"
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}  # of --dtype, and their names in torch


def refuse_world_alone(world: int | None, dry_run: bool) -> None:
    """Raise ``ValueError`` for ``--world`` where something runs."""
    if world is not None and not dry_run:
        raise ValueError(
            f"--world: found {world} without --dry-run; a run has as many processes as are started"
        )


STOPPED = 75  # exit code of a run that a signal stopped (EX_TEMPFAIL): the same command goes on


def exit_unless(finished: bool) -> None:
    """End the command with ``STOPPED`` where its run did not come to its end."""
    if not finished:
        raise typer.Exit(STOPPED)
