"""``gapo-mega audit``: what every aggregation method would have done in a run."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.files import local


def audit(
    run_dir: Annotated[
        Path, typer.Argument(parser=local, metavar="RUN_DIR", help="Directory of a run, finished or running.")
    ],
    method: Annotated[
        list[str] | None, typer.Option("--method", help="Show only this method; may be repeated.")
    ] = None,
    out: Annotated[
        Path | None,
        typer.Option(
            "--out",
            parser=local,
            metavar="PATH",
            help="Where to write audit.csv and audit.png, if not RUN_DIR/audit.",
        ),
    ] = None,
) -> None:
    """Tell, without training, what every aggregation method would have done at each step of a run."""
    from gapo_mega.evaluation.audit import run_audit, target_of
    from gapo_mega.runs.lock import DirectoryLock

    target = target_of(run_dir, out)
    # Its own directory, not the run's: a run that is still going can be audited.
    with DirectoryLock(target, "gapo-mega audit", "--out"):
        run_audit(run_dir, method or [], target)
