"""What ``sft``, ``train-reward`` and ``train-pairs`` share: a run on data here, or in local processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gapo_mega.commands import launch
from gapo_mega.commands.options import OVERWRITE, exit_unless, refuse_world_alone
from gapo_mega.runs.processes import is_main_rank, world_size

if TYPE_CHECKING:
    from gapo_mega.config.supervised import SupervisedConfig
    from gapo_mega.runs.data_run import DataRun

AnyConfig = TypeVar("AnyConfig", bound="SupervisedConfig")


def run_supervised(
    settings: AnyConfig,
    kind: type[DataRun[AnyConfig, Any]],
    nproc: int | None,
    arguments: Sequence[str],
    overwrite: bool,
    *,
    dry_run: bool,
    world: int | None,
) -> None:
    """Run ``kind`` with ``settings``; given ``nproc``, become that many processes with ``arguments``.

    ``dry_run``: say what the run would be on ``world`` processes, and return.
    """
    refuse_world_alone(world, dry_run)
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
    if dry_run:
        _dry_run(kind, settings, world or nproc or world_size())
        return
    if nproc is not None:
        # Here, because torchrun buries the error of a worker.
        _check(kind, settings, nproc, overwrite)
        launch.start(nproc, [*arguments, OVERWRITE] if overwrite else arguments)
    launch.quiet_other_ranks()
    run = kind(settings, overwrite)
    run.run()
    run.engine.close()
    exit_unless(run.finished)


def _check(kind: type[DataRun[AnyConfig, Any]], config: AnyConfig, processes: int, overwrite: bool) -> None:
    from gapo_mega.data.preview import preview_supervised
    from gapo_mega.runs.identity import Identity, settings_of
    from gapo_mega.runs.session import check_before_processes, compare_with_newest

    directory = Path(config.output_dir)
    check_before_processes(directory, kind.wanted(config), overwrite)
    if not overwrite:
        compare_with_newest(config, Identity(kind.command, settings_of(config)), directory)
    tokenizer = kind.check(config, processes).tokenizer
    preview_supervised(config, lambda: tokenizer)


def _dry_run(kind: type[DataRun[AnyConfig, Any]], config: AnyConfig, processes: int) -> None:
    """Print the resolved configuration as YAML, with layout and data as comments below it."""
    from gapo_mega.config.loading import to_yaml
    from gapo_mega.data.preview import preview_supervised
    from gapo_mega.planning.layout import data_parallel_size

    tokenizer = kind.check(config, processes).tokenizer
    if not is_main_rank():
        return
    data = preview_supervised(config, lambda: tokenizer)
    parallel, ranks = config.parallel, data_parallel_size(config.parallel, processes)
    context = f" x context {parallel.context}" if parallel.context > 1 else ""
    sets = f" of each of {config.data_sets} objectives" if config.data_sets > 1 else ""
    print(to_yaml(config))
    for line in (
        f"layout: {processes} processes = tensor {parallel.tensor} x pipeline {parallel.pipeline}{context} x "
        f"data {ranks}",
        f"step: {config.batch_size} rows{sets}, {config.batch_size // ranks} on a data-parallel rank, in "
        f"microbatches of {config.micro_batch_size}",
        *data,
    ):
        print(f"# {line}")
