"""The end of a run: exported model, held-out comparison, report."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from gapo_mega.config import Config
from gapo_mega.engine.base import Engine
from gapo_mega.evaluation.console import print_summary
from gapo_mega.evaluation.heldout_answers import HELDOUT_FILE, write_heldout
from gapo_mega.evaluation.report import SamplePair, write_report
from gapo_mega.evaluation.summary import SUMMARY_FILE, Summary, paired_summary, write_summary
from gapo_mega.rollout.heldout import Answers, HeldOut
from gapo_mega.runs.directory import EXPORT_FOLDER


def finish(
    config: Config,
    engine: Engine,
    names: Sequence[str],
    before: Answers,
    heldout: HeldOut,
    elapsed: Callable[[], float],
    resumed: Sequence[Mapping[str, Any]] = (),
) -> None:
    """Export the policy, answer the held-out prompts again, write summary and report, print the table.

    ``resumed``: where the run went on with other settings, as ``write_summary`` takes it.
    """
    directory = Path(config.output_dir)
    if config.checkpoint.export_hf:
        engine.export_hf(directory / EXPORT_FOLDER)
    after = heldout.answer()
    if engine.layout.is_main:
        summary: Summary = {}
        if after.prompts:
            summary = paired_summary(
                torch.tensor(before.scores),
                torch.tensor(after.scores),
                names,
                heldout.samples,
                [old == new for old, new in zip(before.responses, after.responses, strict=True)],
            )
            write_heldout(
                directory / HELDOUT_FILE,
                names,
                after.prompts,
                [before.responses, after.responses],
                [before.scores, after.scores],
            )
        write_summary(directory / SUMMARY_FILE, summary, elapsed(), resumed)
        pairs = sample_pairs(before, after, names, config.evaluation.shown, heldout.samples)
        print_summary(summary, write_report(directory, pairs))
    engine.barrier()


def sample_pairs(
    before: Answers, after: Answers, names: Sequence[str], count: int, samples: int
) -> list[SamplePair]:
    """The first sample of the first ``count`` held-out prompts."""
    rows = range(0, len(after.prompts), samples)[:count]
    return [
        SamplePair(
            prompt=after.prompts[i],
            before=before.responses[i],
            after=after.responses[i],
            scores_before={name: before.scores[m][i] for m, name in enumerate(names)},
            scores_after={name: after.scores[m][i] for m, name in enumerate(names)},
        )
        for i in rows
    ]
