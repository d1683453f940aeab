"""The ``gapo-mega`` command. Heavy imports happen inside the commands, so that ``--help`` is quick."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

if TYPE_CHECKING:
    from gapo_mega.config import Config

USER_ERROR = 2  # exit code, as for a wrong command line
TRACEBACK = "GAPO_MEGA_TRACEBACK"

# What several commands take.
ConfigFile = Annotated[Path, typer.Option("--config", "-c", help="YAML file of the run.")]
Overrides = Annotated[
    list[str] | None, typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file.")
]
Processes = Annotated[
    int | None, typer.Option(min=1, help="Start this many local processes. Not inside torchrun.")
]

app = typer.Typer(
    name="gapo-mega",
    help="Gradient-Adaptive Policy Optimization of language models on Megatron-core.",
    epilog=f"Errors in what was asked for are one line; set {TRACEBACK}=1 to see where they were raised.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)


def main() -> None:
    """Entry point of the command and of ``python -m gapo_mega.cli``."""
    try:
        app()
    except ValueError as error:
        if os.environ.get(TRACEBACK, "0") not in ("", "0"):
            raise
        print(f"error: {error}", file=sys.stderr)
        sys.exit(USER_ERROR)


def _print_version(wanted: bool) -> None:
    if wanted:
        print(f"gapo-mega {_installed('gapo-mega')}")
        raise typer.Exit


@app.callback()
def _options(
    show_version: Annotated[
        bool, typer.Option("--version", callback=_print_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options before the command's name."""


@app.command()
def train(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file, such as optimizer.lr=1e-6."),
    ] = None,
    nproc: Processes = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print configuration, layout and predicted memory; stop.")
    ] = False,
    world: Annotated[
        int | None, typer.Option(min=1, help="With --dry-run: number of processes to plan for.")
    ] = None,
) -> None:
    """Train a policy on several objectives.

    Runs as one process, as a process of torchrun, or starts local processes itself (--nproc).
    """
    from gapo_mega.commands import launch
    from gapo_mega.config.loading import load

    settings = load(config, overrides or [])
    if world is not None and not dry_run:
        raise ValueError(
            f"--world: found {world} without --dry-run; a run has as many processes as are started"
        )
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
    if dry_run:
        _dry_run(settings, world or nproc or int(os.environ.get("WORLD_SIZE", "1")))
    elif nproc is not None:
        from gapo_mega.runs.preflight import resolve

        resolve(settings, nproc)  # here, because torchrun buries the error of a worker
        launch.start(nproc, ["train", "--config", str(config), *(overrides or [])])
    else:
        _quiet_other_ranks()
        from gapo_mega.runs.start import train as run

        run(settings)


@app.command(name="train-reward")
def train_reward(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
) -> None:
    """Train a reward model on preference pairs (Bradley-Terry), for the objectives of a later training."""
    _supervised("train-reward", config, overrides or [], nproc)


@app.command()
def sft(
    config: ConfigFile,
    overrides: Overrides = None,
    nproc: Processes = None,
) -> None:
    """Fine-tune a language model on conversations, as a warm start of a later training."""
    _supervised("sft", config, overrides or [], nproc)


def _supervised(command: str, file: Path, overrides: list[str], nproc: int | None) -> None:
    from gapo_mega.commands import launch
    from gapo_mega.config.loading import load
    from gapo_mega.config.supervised import RewardModelConfig, SftConfig
    from gapo_mega.runs import supervised as training

    start = (
        partial(training.RewardRun, load(file, overrides, kind=RewardModelConfig))
        if command == "train-reward"
        else partial(training.SftRun, load(file, overrides, kind=SftConfig))
    )
    settings = start.args[0]
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
        training.check(settings, nproc)  # here, because torchrun buries the error of a worker
        launch.start(nproc, [command, "--config", str(file), *overrides])
    _quiet_other_ranks()
    run = start()
    run.run()
    run.engine.close()


@app.command()
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
    import json

    from gapo_mega.commands.plan import make_plan
    from gapo_mega.config.loading import load

    run = make_plan(load(config, overrides or []), world)
    if as_json:
        print(json.dumps(run.as_dict(device_gib), indent=2))
    else:
        print("\n".join([*run.lines(), run.fullest(device_gib)]))


@app.command()
def convert(
    source: Annotated[
        Path,
        typer.Option(
            "--from", help="Hugging Face directory or hub name, Megatron checkpoint, or .gguf file."
        ),
    ],
    target: Annotated[Path, typer.Option("--to", help="The directory to write.")],
    tp: Annotated[
        int, typer.Option("--tp", min=1, help="Tensor-parallel size whose parts are stored apart.")
    ] = 1,
    pp: Annotated[int, typer.Option("--pp", min=1, help="Pipeline size whose stages share the writing.")] = 1,
    dtype: Annotated[str | None, typer.Option(help="fp32, bf16 or fp16. [as in the source]")] = None,
    to: Annotated[
        str | None, typer.Option("--format", help="hf or megatron. [the one that --from is not]")
    ] = None,
    overwrite: Annotated[bool, typer.Option("--overwrite", help="Replace a directory that exists.")] = False,
    nproc: Annotated[
        int | None, typer.Option(min=1, help="Write a checkpoint with this many local processes.")
    ] = None,
) -> None:
    """Convert a model: Hugging Face to Megatron, Megatron to Hugging Face, GGUF to either.

    Any layout can load a Megatron checkpoint, whatever --tp and --pp it was written with.
    """
    from gapo_mega.commands import launch
    from gapo_mega.commands.convert import Conversion

    conversion = Conversion(str(source), target, tp, pp, dtype, to, overwrite)
    conversion.check()
    if nproc is not None:
        conversion.check_processes(nproc)
        launch.refuse_under_torchrun(nproc)
        launch.start(nproc, ["convert", *conversion.arguments()])
    _quiet_other_ranks()
    conversion.run()
    if int(os.environ.get("RANK", "0")) == 0:
        print(f"wrote {target}")


@app.command()
def audit(
    run_dir: Annotated[Path, typer.Argument(help="Directory of a run, finished or running.")],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Show only this method; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Where to write audit.csv and audit.png, if not RUN_DIR/audit."),
    ] = None,
) -> None:
    """Tell, without training, what every aggregation method would have done at each step of a run."""
    from gapo_mega.evaluation.audit import run_audit

    run_audit(run_dir, method or [], out)


@app.command()
def serve_reward(
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings of the objective, such as options.dtype=bf16."),
    ] = None,
    config: Annotated[
        Path | None, typer.Option("--config", "-c", help="YAML file of one objective, of any kind.")
    ] = None,
    model: Annotated[
        str | None, typer.Option(help="Instead: directory or hub name of a classifier (kind hf_classifier).")
    ] = None,
    function: Annotated[str | None, typer.Option(help="Instead: module:function (kind python).")] = None,
    host: Annotated[str, typer.Option(help="Address to listen at.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="Port; 0 takes a free one.")] = 8000,
) -> None:
    """Serve a reward over HTTP, for objectives of kind http of any training."""
    from gapo_mega.commands import serve_reward as reward_server

    logging.basicConfig(level=logging.WARNING)
    reward_server.serve(reward_server.objective_config(config, model, function, overrides or []), host, port)


benchmark = typer.Typer(help="Measure what parts of a training cost on this machine.", no_args_is_help=True)
app.add_typer(benchmark, name="benchmark")


@benchmark.command()
def step(
    config: Annotated[
        Path, typer.Option("--config", "-c", help="YAML file of a run: model, layout, lengths.")
    ],
    overrides: Overrides = None,
    objectives: Annotated[
        list[int] | None, typer.Option(min=1, max=16, help="Numbers of objectives; may be repeated. [2 4]")
    ] = None,
    rounds: Annotated[int, typer.Option(min=1, help="Timed turns of every strategy.")] = 5,
    out: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("step-benchmark.json"),
    nproc: Processes = None,
) -> None:
    """Time and memory of every gradient strategy, as a ratio to the step with one objective."""
    from gapo_mega.commands import launch
    from gapo_mega.config.loading import load
    from gapo_mega.measuring.step_report import check_target
    from gapo_mega.runs.preflight import resolve

    settings, counts = load(config, overrides or []), objectives or [2, 4]
    check_target(out)
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
        resolve(settings, nproc)
        options = [f"--objectives={count}" for count in counts]
        arguments = ["--config", str(config), f"--rounds={rounds}", f"--out={out}", *options]
        launch.start(nproc, ["benchmark", "step", *arguments, *(overrides or [])])
    world = int(os.environ.get("WORLD_SIZE", "1"))
    resolved = resolve(settings, world)
    _quiet_other_ranks()
    from gapo_mega.measuring import step_report as report
    from gapo_mega.measuring.step import StepBenchmark

    run = StepBenchmark(resolved, counts)
    run.run(rounds)
    result = {**report.circumstances(settings, world, rounds), **run.result()}
    if run.engine.layout.is_main:
        report.print_table(result)
        report.write(out, result)
        print(f"written: {out}")
    run.engine.close()


@app.command()
def info() -> None:
    """Show versions, the compiled extension, devices, and which optional packages are usable."""
    import platform

    import torch

    from gapo_mega import ops, optional

    print(f"gapo-mega      {_installed('gapo-mega')}")
    print(f"python         {platform.python_version()} on {platform.machine()}")
    for package in ("torch", "megatron-core", "transformers", "datasets"):
        print(f"{package:<14} {_installed(package)}")
    print(f"extension      {', '.join(f'{key} {value}' for key, value in ops.info().items())}")
    devices = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
    print(f"devices        {', '.join(devices) or 'CPU only (no CUDA device)'}")
    probes = {
        "transformer-engine": optional.transformer_engine(),
        "apex": optional.apex(),
        "wandb": optional.wandb(),
        "serve": optional.serve(),
    }
    for name, probe in probes.items():
        print(f"{name:<18} {'used' if probe.usable else 'not used'}: {probe.found}")
        if probe.lost:
            print(f"{'':<18} without it: {probe.lost}")


def _installed(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "(not installed)"


def _dry_run(config: Config, world_size: int) -> None:
    """Print the run as it would be: YAML, with layout and memory as comments below it."""
    from gapo_mega.commands.plan import make_plan
    from gapo_mega.config.loading import to_yaml

    run = make_plan(config, world_size)
    if int(os.environ.get("RANK", "0")) != 0:
        return
    print(to_yaml(config))
    for line in run.lines():
        print(f"# {line}")


def _quiet_other_ranks() -> None:
    """One voice: progress from rank 0, errors from everyone."""
    main_rank = int(os.environ.get("RANK", "0")) == 0
    logging.basicConfig(
        level=logging.WARNING if main_rank else logging.ERROR,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
    )
    if main_rank:
        logging.getLogger("gapo_mega").setLevel(logging.INFO)
        # Megatron says at every import which accelerators are missing; `gapo-mega info` says it once.
        warnings.filterwarnings("ignore", module=r"megatron\.")
    else:
        warnings.simplefilter("ignore")
        os.environ["HF_DATASETS_DISABLE_PROGRESS_BARS"] = "1"


if __name__ == "__main__":
    main()
