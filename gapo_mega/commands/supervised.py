"""What ``sft`` and ``train-reward`` share: a supervised run here, or in local processes."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, TypeVar

from gapo_mega.commands import launch
from gapo_mega.commands.options import OVERWRITE

if TYPE_CHECKING:
    from gapo_mega.config.supervised import SupervisedConfig
    from gapo_mega.runs.supervised import SupervisedRun

AnyConfig = TypeVar("AnyConfig", bound="SupervisedConfig")


def run_supervised(
    settings: AnyConfig,
    kind: type[SupervisedRun[AnyConfig]],
    nproc: int | None,
    arguments: Sequence[str],
    overwrite: bool,
) -> None:
    """Run ``kind`` with ``settings``; given ``nproc``, become that many processes with ``arguments``."""
    if nproc is not None:
        from gapo_mega.runs.session import check_before_processes
        from gapo_mega.runs.supervised import check

        launch.refuse_under_torchrun(nproc)
        # Here, because torchrun buries the error of a worker.
        check_before_processes(Path(settings.output_dir), kind.wanted(settings), overwrite)
        check(settings, nproc)
        launch.start(nproc, [*arguments, OVERWRITE] if overwrite else arguments)
    launch.quiet_other_ranks()
    run = kind(settings, overwrite)
    run.run()
    run.engine.close()
