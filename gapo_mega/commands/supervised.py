"""What ``sft``, ``train-reward`` and ``train-pairs`` share: a run on data here, or in local processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from gapo_mega.commands import launch
from gapo_mega.commands.options import OVERWRITE

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
) -> None:
    """Run ``kind`` with ``settings``; given ``nproc``, become that many processes with ``arguments``."""
    if nproc is not None:
        launch.refuse_under_torchrun(nproc)
        # Here, because torchrun buries the error of a worker.
        _check(kind, settings, nproc, overwrite)
        launch.start(nproc, [*arguments, OVERWRITE] if overwrite else arguments)
    launch.quiet_other_ranks()
    run = kind(settings, overwrite)
    run.run()
    run.engine.close()


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
