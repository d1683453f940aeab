"""Tables of the sweeps of docs/comparison.md.

    python -m benchmarks.comparison runs/comparison/kinds runs/comparison/kinds-averaged --out runs/tables

Writes gains.md, gains.json with every point, and gains.png. --judged: judged.md and so on, of the scores of
benchmarks.comparison.judges.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Annotated

import typer

from benchmarks.comparison import gains, picture

app = typer.Typer(add_completion=False, rich_markup_mode=None)


@app.command(help=__doc__)
def main(
    sweeps: Annotated[list[Path], typer.Argument(help="output directories of gapo-mega sweep")],
    judged: Annotated[bool, typer.Option("--judged", help="by models that no run was trained on")] = False,
    out: Annotated[Path, typer.Option(help="folder for the tables")] = Path("runs/comparison/tables"),
) -> None:
    try:
        points = gains.read(sweeps, gains.JUDGED if judged else gains.ANSWERS)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    out.mkdir(parents=True, exist_ok=True)
    text = gains.table(points)
    name = "judged" if judged else "gains"
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    rows = [dataclasses.asdict(point) for point in points]
    (out / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n", encoding="utf-8")
    picture.draw(points, out / f"{name}.png")
    print(text)


if __name__ == "__main__":
    app()
