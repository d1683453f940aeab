"""The end of a run: exported model, held-out comparison, report."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from gapo_mega.config import Config
from gapo_mega.engine.base import Engine
from gapo_mega.evaluation.console import print_summary
from gapo_mega.evaluation.heldout_answers import HELDOUT_FILE, write_heldout
from gapo_mega.evaluation.report import REPORT_FOLDER, write_report
from gapo_mega.evaluation.standing import Standing
from gapo_mega.evaluation.summary import SUMMARY_FILE, write_summary
from gapo_mega.runs.directory import ADAPTER_FOLDER, EXPORT_FOLDER
from gapo_mega.runs.earlier_ends import set_aside_others
from gapo_mega.runs.evaluations import Evaluations
from gapo_mega.runs.uploading import put_from_main
from gapo_mega.runs.uploads import Export

logger = logging.getLogger(__name__)


def finish(
    config: Config,
    engine: Engine,
    names: Sequence[str],
    evaluations: Evaluations,
    done: int,
    best_checkpoint: Path | None,
    elapsed: Callable[[], float],
    resumed: Sequence[Mapping[str, Any]] = (),
    export: Export | None = None,
) -> None:
    """Export the policy, answer the held-out prompts again, write summary and report, print the table.

    Args:
        done: steps that the run has done.
        best_checkpoint: of the run's result, which is loaded; None: the policy as it is.
        resumed: where the run went on with other settings, as ``write_summary`` takes it.
        export: where the exported model goes, too.
    """
    directory, best = Path(config.output_dir), evaluations.selection.best
    step = done if best is None else best.step
    if best_checkpoint is not None:
        engine.load(best_checkpoint)
    if best is not None and engine.layout.is_main:
        logger.info("the result of the run is %s", best.sentence())
    evaluations.update_weights()
    if engine.layout.is_main:
        set_aside_others(directory, step, _written(config))
    if config.checkpoint.export_hf:
        engine.export_hf(directory / EXPORT_FOLDER)
    if config.checkpoint.export_adapter:
        engine.export_adapter(directory / ADAPTER_FOLDER)
    after = evaluations.answers(step)
    if engine.layout.is_main:
        before = evaluations.before
        assert before is not None
        summary, standing = (
            evaluations.summary(after),
            Standing(step, done, config.steps, ended=True, best=best),
        )
        if after.prompts:
            write_heldout(
                directory / HELDOUT_FILE,
                names,
                after.prompts,
                [before.responses, after.responses],
                [before.scores, after.scores],
            )
        write_summary(directory / SUMMARY_FILE, summary, elapsed(), resumed, standing)
        report = write_report(directory, evaluations.samples(after))
        print_summary(summary, report, standing=standing)
    engine.barrier()
    if export is not None:  # last: what was found out is not lost where this fails
        put_from_main(export, directory / EXPORT_FOLDER, step, engine)


def _written(config: Config) -> list[str]:
    """What this end of the run writes."""
    models = {EXPORT_FOLDER: config.checkpoint.export_hf, ADAPTER_FOLDER: config.checkpoint.export_adapter}
    return [*(name for name, wanted in models.items() if wanted), HELDOUT_FILE, SUMMARY_FILE, REPORT_FOLDER]
