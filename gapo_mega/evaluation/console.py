"""The table that ends a run in the terminal."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gapo_mega.evaluation.standing import Standing
from gapo_mega.evaluation.summary import ONE_RUN, Change, Summary

_COLOURS = {"better": "green", "worse": "red"}


def summary_table(summary: Summary) -> Table:
    """Objective, before, after, change, standard error, change in standard errors."""
    table = Table(
        title="Held-out reward before and after training", title_justify="left", box=box.SIMPLE_HEAD
    )
    table.add_column("objective", style="bold", overflow="fold")
    for column in ("before", "after", "change", "std. err.", "change / s.e.", "prompts"):
        table.add_column(column, justify="right", no_wrap=True)
    for name, found in summary.items():
        table.add_row(
            escape(name),
            f"{found.before:.4g}",
            f"{found.after:.4g}",
            f"{found.difference:+.4g}",
            "-" if math.isnan(found.standard_error) else f"{found.standard_error:.3g}",
            _ratio(found),
            str(found.samples),
        )
    return table


def _ratio(found: Change) -> str:
    """In green or red where the finding says so, never because the number is large."""
    ratio = found.in_standard_errors
    if ratio is None:
        return "-"
    colour = _COLOURS.get(found.finding, "yellow")
    return f"[{colour}]{ratio:+.1f}[/{colour}]"


def print_summary(
    summary: Summary, report: Path | None, console: Console | None = None, standing: Standing | None = None
) -> None:
    """Print the table, what it allows to say of every objective, and where the report lies.

    ``standing``: of which step the numbers are.
    """
    console = console or Console()
    if standing is not None and standing.stopped_early:
        console.print(standing.sentence(), markup=False, highlight=False)
    if standing is not None and standing.best is not None:
        told = f'the result of the run, and "after" below: {standing.best.sentence()}'
        console.print(told, markup=False, highlight=False)
    console.print(summary_table(summary))
    for name, found in summary.items():
        console.print(f"{name}: {found.sentence()}", markup=False, highlight=False)
    if any(found.half_width is not None for found in summary.values()):
        console.print(ONE_RUN, style="dim", markup=False, highlight=False)
    if report is not None:
        # Readers copy the path, so it must stay in one piece.
        console.print(f"report: {report}", soft_wrap=True, markup=False, highlight=False)
