"""Tables of the sweeps of docs/comparison.md.

    python -m benchmarks.comparison runs/comparison/kinds runs/comparison/kinds-averaged --out runs/tables

Writes gains.md, and gains.json with every point.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.comparison import gains

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(
    sweeps: Annotated[list[Path], typer.Argument(help="output directories of gapo-mega sweep")],
    out: Annotated[Path, typer.Option(help="folder for the tables")] = Path("runs/comparison/tables"),
) -> None:
    try:
        points = gains.read(sweeps)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    text = gains.table(points)
    (out / "gains.md").write_text(text, encoding="utf-8")
    rows = [dataclasses.asdict(point) for point in points]
    (out / "gains.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    print(text)


if __name__ == "__main__":
    app()
