"""What a run has come to, read from its directory for the loggers."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

from gapo_mega.evaluation.heldout_answers import HELDOUT_FILE
from gapo_mega.evaluation.report import REPORT_FOLDER, REPORT_PAGE
from gapo_mega.evaluation.series import is_number
from gapo_mega.evaluation.summary import SUMMARY_FILE, Summary, read_summary
from gapo_mega.runs.loggers.base import Cell, Outcome, Table

SHOWN = 6  # answers, where the configuration does not say how many


def read_outcome(directory: Path, step: int, shown: int = SHOWN) -> Outcome:
    """Summary, tables, pictures and page of the run in ``directory``, as far as it has written them.

    Args:
        step: the run's last optimizer step.
        shown: held-out prompts whose answers are taken.
    """
    found = Outcome(step)
    summary = directory / SUMMARY_FILE
    if summary.is_file():
        document = json.loads(summary.read_text(encoding="utf-8"))
        found = replace(found, numbers=dict(_numbers(document, "summary")))
        if document.get("objectives"):
            found = replace(found, tables={"heldout": _heldout_table(read_summary(summary)[0])})
    answers = directory / HELDOUT_FILE
    if answers.is_file() and shown:
        table = _answers_table(answers, shown)
        found = replace(found, tables={**found.tables, "answers": table} if table.rows else found.tables)
    report = directory / REPORT_FOLDER
    page = report / REPORT_PAGE
    return replace(
        found,
        pictures={path.stem: path for path in sorted(report.glob("*.png"))},
        page=page if page.is_file() else None,
    )


def _numbers(value: object, key: str) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, inner in value.items():
            yield from _numbers(inner, f"{key}/{name}")
    elif is_number(value):
        assert isinstance(value, int | float)
        yield key, float(value)


def _heldout_table(summary: Summary) -> Table:
    columns = ["objective", "before", "after", "change", "standard error", "prompts", "finding", "in words"]
    rows: list[list[Cell]] = [
        [
            name,
            change.before,
            change.after,
            change.difference,
            change.standard_error if math.isfinite(change.standard_error) else None,
            change.samples,
            change.finding,
            change.sentence(),
        ]
        for name, change in summary.items()
    ]
    return Table(columns, rows)


def _answers_table(path: Path, shown: int) -> Table:
    """The first answer to each of the first ``shown`` prompts, before and after training."""
    # Not splitlines: texts may hold other characters at which that would split.
    rows = (json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line)
    chosen = list(islice(_first_of_prompts(rows), shown))
    names = list(chosen[0]["after"]["scores"]) if chosen else []
    scores = [f"{name} {when}" for when in ("before", "after") for name in names]
    columns = ["prompt", "before", "after", *scores]
    return Table(
        columns,
        [
            [
                row["prompt"],
                row["before"]["response"],
                row["after"]["response"],
                *(row[when]["scores"][name] for when in ("before", "after") for name in names),
            ]
            for row in chosen
        ],
    )


def _first_of_prompts(rows: Iterator[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """The samples of a prompt stand side by side."""
    last: object = None
    for row in rows:
        if row["prompt"] != last:
            yield row
        last = row["prompt"]
