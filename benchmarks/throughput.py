"""Tokens per second and time by phase of training steps with a configuration.

    torchrun --nproc_per_node 2 benchmarks/throughput.py --config examples/demo.yaml --steps 3

Prints a table and writes JSON. The first step is a warm-up and not counted. Works on CPU and GPU.
"""

from __future__ import annotations

import json
import tempfile
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False)


@app.command(help=__doc__)
def main(
    config: Annotated[Path, typer.Option(help="YAML configuration of a run")],
    overrides: Annotated[list[str] | None, typer.Argument(help="key=value overrides")] = None,
    steps: Annotated[int, typer.Option(min=1, help="timed rollout steps")] = 3,
    out: Annotated[Path, typer.Option(help="JSON file to write")] = Path("throughput.json"),
) -> None:
    """Run ``steps`` steps and report."""
    try:
        run(config, overrides or [], steps, out)
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


def run(config: Path, overrides: list[str], steps: int, out: Path) -> None:
    """Train for a few steps in a temporary directory beside ``out`` and report on rank 0."""
    from gapo_mega.measuring.throughput import benchmark_config, measure, print_table
    from gapo_mega.planning.methods import load
    from gapo_mega.runs.preflight import resolve
    from gapo_mega.runs.processes import is_main_rank, peers, world_size
    from gapo_mega.runs.start import run_training

    out.parent.mkdir(parents=True, exist_ok=True)
    everyone = peers()
    with ExitStack() as stack:
        own = None
        if is_main_rank():  # all ranks of a run share its directory
            made = tempfile.TemporaryDirectory(prefix=".throughput-", dir=out.parent.absolute())
            own = stack.enter_context(made)
        settings = benchmark_config(load(config, overrides), steps, Path(everyone.gather(own)[0]))
        resolved = resolve(settings, world_size())
        run_training(resolved, with_report=False)
        if not is_main_rank():
            return
        result = measure(resolved)
    out.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print_table(result)
    typer.echo(f"written: {out}")


if __name__ == "__main__":
    app()
