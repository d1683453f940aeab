"""``gapo-mega plan``: predicts what a run needs on a number of processes."""

from __future__ import annotations

import json
import math
from typing import TYPE_CHECKING, Annotated

import typer

from gapo_mega.commands.options import ConfigFile
from gapo_mega.planning import devices

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
    device: Annotated[
        str | None,
        typer.Option(help="Also tell how fast a step could be at most on GPUs of this name, such as H100."),
    ] = None,
    prompt_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of a prompt, for --device. [the most allowed]")
    ] = None,
    response_tokens: Annotated[
        int | None, typer.Option(min=1, help="Mean tokens of a response, for --device. [the most allowed]")
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print bytes, for programs.")] = False,
) -> None:
    """Predict the memory of every rank in a layout, without the model's weights or any device."""
    from gapo_mega.planning.methods import load

    if device_gib is not None and not math.isfinite(device_gib):
        raise ValueError(f"--device-gib: found {device_gib}, accepted: a finite number of GiB, 0 or more")
    _check_speed(device, prompt_tokens, response_tokens)
    run = make_plan(load(config, overrides or []), world)
    from gapo_mega.planning import speed

    fast = None if device is None else speed.ceiling(run.resolved, device, prompt_tokens, response_tokens)
    if as_json:
        print(json.dumps(run.as_dict(device_gib) | ({} if fast is None else fast.as_dict()), indent=2))
    else:
        last = [] if fast is None else [fast.line(), speed.LEFT_OUT]
        print("\n".join([*run.lines(), run.fullest(device_gib), NOT_COUNTED, *last]))


def _check_speed(device: str | None, prompt_tokens: int | None, response_tokens: int | None) -> None:
    """Raise ``ValueError`` for a device that is not known, and for lengths that nothing asks for."""
    for option, found in (("--prompt-tokens", prompt_tokens), ("--response-tokens", response_tokens)):
        if found is not None and device is None:
            raise ValueError(f"{option}: found {found} without --device, which it is for")
    if device is not None and devices.known(device) is None:
        raise ValueError(f"--device: found {device!r}, accepted: {', '.join(devices.NAMES)}")


def make_plan(config: Config, world_size: int) -> RunPlan:
    """Plan the run on ``world_size`` processes from the model's configuration, without its weights.

    Raises ``ValueError`` for settings that do not fit together.
    """
    from gapo_mega.planning.memory import predict
    from gapo_mega.planning.run import RunPlan
    from gapo_mega.runs.preflight import resolve

    resolved = resolve(config, world_size, shapes_only=True)
    return RunPlan(resolved, predict(resolved))
