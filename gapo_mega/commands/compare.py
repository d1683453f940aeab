"""``gapo-mega compare``: any runs as one table, with tests and cost."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.files import local


def compare(
    runs: Annotated[
        list[Path],
        typer.Argument(
            parser=local, metavar="RUN...", help="Directories of runs that have ended, or of sweeps."
        ),
    ],
    baseline: Annotated[
        str | None, typer.Option(help="The method that the others are tested against. [the first]")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(parser=local, metavar="DIR", help="Also write Markdown, CSV, JSON and pictures there."),
    ] = None,
) -> None:
    """Compare runs: methods with means and standard errors over seeds, paired tests, and what they cost."""
    from gapo_mega.evaluation import compare as comparing
    from gapo_mega.evaluation.compare_tables import markdown
    from gapo_mega.evaluation.finished_run import read_run
    from gapo_mega.runs.lock import DirectoryLock
    from gapo_mega.runs.sweep_results import point_directories

    directories, unfinished = point_directories(runs)
    for directory in unfinished:
        print(f"left out, has not ended: {directory}", file=sys.stderr)
    found = comparing.compare([read_run(directory) for directory in directories], baseline)
    print(markdown(found))
    if out is not None:
        from gapo_mega.evaluation.compare_files import write_comparison

        with DirectoryLock(out, "gapo-mega compare", "--out"):
            for path in write_comparison(out, found):
                print(f"written: {path}")
