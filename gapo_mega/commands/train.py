"""``gapo-mega train``: trains a policy, or prints what the run would be."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from gapo_mega.commands import launch
from gapo_mega.commands.options import (
    OVERWRITE,
    ConfigFile,
    Overwrite,
    Processes,
    World,
    exit_unless,
    refuse_world_alone,
)
from gapo_mega.runs.processes import is_main_rank, world_size

if TYPE_CHECKING:
    from gapo_mega.config import Config


def train(
    config: ConfigFile,
    overrides: Annotated[
        list[str] | None,
        typer.Argument(metavar="KEY=VALUE", help="Settings on top of the file, such as optimizer.lr=1e-6."),
    ] = None,
    nproc: Processes = None,
    overwrite: Overwrite = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Check the data's first rows; print configuration, layout and memory; stop."
        ),
    ] = False,
    world: World = None,
) -> None:
    """Train a policy on several objectives.

    Runs as one process, as a process of torchrun, or starts local processes itself (--nproc).
    """
    from gapo_mega.planning.methods import load

    settings = load(config, overrides or [])
    refuse_world_alone(world, dry_run)
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
    if dry_run:
        _dry_run(settings, world or nproc or world_size())
    elif nproc is not None:
        from gapo_mega.runs.preflight import preview
        from gapo_mega.runs.start import check_before

        check_before(settings, nproc, overwrite)  # here, because torchrun buries the error of a worker
        preview(settings)
        again = [OVERWRITE] if overwrite else []
        launch.start(nproc, ["train", "--config", str(config), *again, *(overrides or [])])
    else:
        launch.quiet_other_ranks()
        from gapo_mega.runs.start import train as run

        exit_unless(run(settings, overwrite))


def _dry_run(config: Config, world_size: int) -> None:
    """Print the resolved configuration as YAML, with layout, memory and data as comments below it."""
    from gapo_mega.commands.plan import make_plan
    from gapo_mega.config.loading import to_yaml
    from gapo_mega.runs.preflight import check_here, preview

    run = make_plan(config, world_size)
    check_here(config)
    if not is_main_rank():
        return
    data = preview(config, shapes_only=True)
    print(to_yaml(config))
    for line in [*run.lines(), *data]:
        print(f"# {line}")
