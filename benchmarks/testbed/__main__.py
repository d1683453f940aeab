"""Every method in every regime of the exact test bed; see docs/testbed.md.

    python -m benchmarks.testbed --out runs/benchmarks/testbed --seeds 12

Finished cells are kept in --out and not computed again, nor are those of another run's results.json that
--known names. Writes results.json, tables.md and trajectories.png.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def chosen(option: str, wanted: list[str] | None, known: list[str]) -> list[str]:
    """Those of ``known`` that are wanted, all if none is named.

    Raises:
        ValueError: a name that is not known.
    """
    unknown = [name for name in wanted or [] if name not in known]
    if unknown:
        raise ValueError(f"{option}: found {unknown[0]!r}, accepted: {', '.join(known)}")
    return [name for name in known if not wanted or name in wanted]


def require_folder(out: Path) -> None:
    """Raise ``ValueError`` where ``out`` is, or lies in, something that is no folder."""
    for path in (out, *out.parents):
        if path.exists() and not path.is_dir():
            raise ValueError(f"out: found {path}, which is no folder; accepted: a folder, there or not yet")


@app.command(help=__doc__)
def main(
    out: Annotated[Path, typer.Option(help="folder for cells, tables and the picture")] = Path(
        "runs/benchmarks/testbed"
    ),
    seeds: Annotated[int, typer.Option(min=2, help="instances of every regime")] = 12,
    steps: Annotated[int, typer.Option(min=1, help="of the optimizer")] = 200,
    regime: Annotated[list[str] | None, typer.Option(help="only these, once each")] = None,
    method: Annotated[list[str] | None, typer.Option(help="only these, once each")] = None,
    fronts: Annotated[bool, typer.Option(help="also the fronts over preferences")] = True,
    workers: Annotated[int, typer.Option(min=1, help="processes")] = 1,
    picture: Annotated[bool, typer.Option(help="also the picture of trajectories")] = True,
    known: Annotated[
        Path | None, typer.Option(help="results.json of another run: what it has counts as done")
    ] = None,
) -> None:
    """Run, report, write."""
    import torch

    from benchmarks.testbed import run
    from benchmarks.testbed.cells import Plan
    from benchmarks.testbed.methods import METHODS
    from benchmarks.testbed.regimes import REGIMES
    from benchmarks.testbed.store import Store

    torch.set_num_threads(1)  # tensors of a few numbers
    try:
        wanted = chosen("regime", regime, list(REGIMES)), chosen("method", method, list(METHODS))
        require_folder(out)
        store = Store(out / "cells", Plan(seeds, steps))
        if known is not None:
            typer.echo(f"{known}: {store.adopt(known)} results")
        for path in run.everything(store, out, *wanted, fronts=fronts, picture=picture, workers=workers):
            typer.echo(f"written: {path}")
    except ValueError as error:
        typer.echo(f"error: {error}", err=True)
        raise typer.Exit(2) from error


if __name__ == "__main__":
    app()
