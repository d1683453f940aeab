"""The table that ends a run in the terminal."""

from __future__ import annotations

import math
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from gapo_mega.evaluation.summary import Summary


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
            _ratio(found.in_standard_errors),
            str(found.samples),
        )
    return table


def _ratio(ratio: float | None) -> str:
    """Green or red beyond two standard errors; a smaller change may be chance."""
    if ratio is None:
        return "-"
    colour = "green" if ratio > 2 else "red" if ratio < -2 else "yellow"
    return f"[{colour}]{ratio:+.1f}[/{colour}]"


def print_summary(summary: Summary, report: Path | None, console: Console | None = None) -> None:
    """Print the table and where the report lies."""
    console = console or Console()
    console.print(summary_table(summary))
    if report is not None:
        # Readers copy the path, so it must stay in one piece.
        console.print(f"report: {report}", soft_wrap=True, markup=False, highlight=False)
