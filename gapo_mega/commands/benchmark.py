"""``gapo-mega benchmark``: the group of the commands that measure."""

from __future__ import annotations

from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import ConfigFile, Overrides, Processes
from gapo_mega.files import local
from gapo_mega.runs.processes import world_size

if TYPE_CHECKING:
    from gapo_mega.config import Config

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


@app.command()
def throughput(
    config: ConfigFile,
    overrides: Overrides = None,
    steps: Annotated[int, typer.Option(min=1, help="Timed rollout steps, after one that is not.")] = 3,
    out: Annotated[Path, typer.Option(parser=local, metavar="PATH", help="JSON file to write.")] = Path(
        "throughput.json"
    ),
    nproc: Processes = None,
) -> None:
    """Tokens per second, time by phase and utilisation of whole training steps."""
    from gapo_mega.measuring import step_report
    from gapo_mega.planning.methods import load
    from gapo_mega.runs.preflight import resolve

    settings = load(config, overrides or [])
    step_report.check_target(out)
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
        resolve(settings, nproc)
        arguments = ["--config", str(config), f"--steps={steps}", f"--out={out}"]
        launch.start(nproc, ["benchmark", "throughput", *arguments, *(overrides or [])])
    launch.quiet_other_ranks()
    _time_steps(settings, steps, out)


def _time_steps(settings: Config, steps: int, out: Path) -> None:
    """Train in a temporary directory beside ``out``, and report on rank 0."""
    from gapo_mega.measuring.step_report import write
    from gapo_mega.measuring.throughput import benchmark_config, measure, print_table
    from gapo_mega.runs.preflight import resolve
    from gapo_mega.runs.processes import is_main_rank, peers
    from gapo_mega.runs.start import run_training
    from gapo_mega.scratch import remove_left, scratch

    everyone = peers()
    with ExitStack() as stack:
        own = None
        if is_main_rank():  # all ranks of a run share its directory
            out.parent.mkdir(parents=True, exist_ok=True)
            parent = out.parent.absolute()
            remove_left(parent, ".throughput-")
            own = str(stack.enter_context(scratch(parent, ".throughput-"))[0] / "run")
        short = benchmark_config(settings, steps, Path(everyone.gather(own)[0]))
        resolved = resolve(short, world_size())
        run_training(resolved, with_report=False)
        if not is_main_rank():
            return
        result = measure(resolved)
    print_table(result)
    write(out, result)
    print(f"written: {out}")
