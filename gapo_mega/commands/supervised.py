"""What ``sft`` and ``train-reward`` share: a supervised run here, or in local processes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, TypeVar

from gapo_mega.commands import launch

if TYPE_CHECKING:
    from gapo_mega.config.supervised import SupervisedConfig
    from gapo_mega.runs.supervised import SupervisedRun

AnyConfig = TypeVar("AnyConfig", bound="SupervisedConfig")


def run_supervised(
    settings: AnyConfig,
    kind: Callable[[AnyConfig], SupervisedRun[AnyConfig]],
    nproc: int | None,
    arguments: Sequence[str],
) -> None:
    """Run ``kind`` with ``settings``; given ``nproc``, become that many processes with ``arguments``."""
    if nproc is not None:
        from gapo_mega.data.preview import preview_supervised
        from gapo_mega.runs.supervised import check

        launch.refuse_under_torchrun(nproc)
        tokenizer = check(settings, nproc).tokenizer  # here, because torchrun buries the error of a worker
        preview_supervised(settings, lambda: tokenizer)
        launch.start(nproc, arguments)
    launch.quiet_other_ranks()
    run = kind(settings)
    run.run()
    run.engine.close()
