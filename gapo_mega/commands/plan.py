"""``gapo-mega plan``: predicts what a run needs on a number of processes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from gapo_mega.commands.options import ConfigFile

if TYPE_CHECKING:
    from gapo_mega.config import Config
    from gapo_mega.planning.run import RunPlan


NOT_COUNTED = (
    "Predicted, not measured. Not counted: the device's context (with the kernels' stacks, about 0.3 GiB), "
    "what its allocator keeps in reserve, buffers of the communication library, and reward models of kind "
    "hf_classifier."
)


def plan(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file, such as parallel.tensor=8."),
    ] = None,
    world: Annotated[int, typer.Option(min=1, help="Number of processes to plan for.")] = 1,
    device_gib: Annotated[
        float | None, typer.Option(min=0, help="Also tell whether a rank fits into a device of this size.")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print bytes, for programs.")] = False,
) -> None:
    """Predict the memory of every rank in a layout, without the model's weights or any device."""
    from gapo_mega.planning.methods import load

    if device_gib is not None and not math.isfinite(device_gib):
        raise ValueError(f"--device-gib: found {device_gib}, accepted: a finite number of GiB, 0 or more")
    run = make_plan(load(config, overrides or []), world)
    if as_json:
        print(json.dumps(run.as_dict(device_gib), indent=2))
    else:
        print("\n".join([*run.lines(), run.fullest(device_gib), NOT_COUNTED]))


def make_plan(config: Config, world_size: int) -> RunPlan:
    """Plan the run on ``world_size`` processes from the model's configuration, without its weights.

    Raises ``ValueError`` for settings that do not fit together.
    """
    from gapo_mega.planning.memory import predict
    from gapo_mega.planning.run import RunPlan
    from gapo_mega.runs.preflight import resolve

    resolved = resolve(config, world_size, shapes_only=True)
    return RunPlan(resolved, predict(resolved))
