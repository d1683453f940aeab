"""``gapo-mega benchmark``: the group of the commands that measure."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import Overrides, Processes
from gapo_mega.files import local
from gapo_mega.runs.processes import world_size

app = typer.Typer(help="Measure what parts of a training cost on this machine.", no_args_is_help=True)


@app.command()
def step(
    config: Annotated[
        Path,
        typer.Option(
            "--config", "-c", parser=local, metavar="PATH", help="YAML file of a run: model, layout, lengths."
        ),
    ],
    overrides: Overrides = None,
    objectives: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Numbers of objectives; may be repeated. [2 4]")
    ] = None,
    only: Annotated[
        list[str] | None,
        typer.Option(help="Measure strategies with this in their name; may be repeated. [all]"),
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every strategy.")] = 5,
    out: Annotated[Path, typer.Option(parser=local, metavar="PATH", help="JSON file to write.")] = Path(
        "step-benchmark.json"
    ),
    nproc: Processes = None,
) -> None:
    """Time and memory of every gradient strategy, as a ratio to the step with one objective."""
    from gapo_mega.measuring import step_report as report
    from gapo_mega.planning.methods import load
    from gapo_mega.runs.preflight import resolve

    settings, counts = load(config, overrides or []), objectives or [2, 4]
    from gapo_mega.measuring.step import StepBenchmark, check_names

    check_names(only or [])
    report.check_target(out)
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
        resolve(settings, nproc)
        options = [f"--objectives={count}" for count in counts] + [f"--only={text}" for text in only or []]
        arguments = ["--config", str(config), f"--rounds={rounds}", f"--out={out}", *options]
        launch.start(nproc, ["benchmark", "step", *arguments, *(overrides or [])])
    launch.quiet_other_ranks()
    world = world_size()
    resolved = resolve(settings, world)

    run = StepBenchmark(resolved, counts, only or [])
    run.run(rounds)
    result = {**report.circumstances(settings, world, rounds), **run.result()}
    if run.engine.layout.is_main:
        report.print_table(result)
        report.write(out, result)
        print(f"written: {out}")
    run.engine.close()
