"""Raw results of sweeps as files to commit: tables come from them without a run.

    python -m benchmarks.comparison.keep runs/comparison/kinds --out benchmarks/results/comparison
    python -m benchmarks.comparison benchmarks/results/comparison/kinds

Keeps the held-out answers with their scores, the metrics of every step, and the judges' scores of every
point that has ended, packed, beside the points of that sweep that were kept before. A point that has ended
again takes the place of the one that was kept.
"""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Annotated, Any

import typer

from benchmarks.comparison.gains import ANSWERS, JUDGED, METRICS, RESULTS, ended_runs, packed_name
from gapo_mega.evaluation.files import replacing, write_text

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def keep(sweep: Path, out: Path) -> list[str]:
    """The names of the points of ``sweep`` that ``out / sweep.name`` holds after this.

    Raises ``ValueError`` as ``ended_runs``, and for a point without answers.
    """
    target = out / sweep.resolve().name
    points: dict[str, Any] = {}
    if (target / RESULTS).is_file():
        points = {str(point["name"]): point for _, point, _ in ended_runs([target])}
    for _, point, run in ended_runs([sweep]):
        name = str(point["name"])
        points[name] = point
        if not (run / ANSWERS).is_file():
            raise ValueError(f"{run}: found no {ANSWERS}, accepted: runs that have it")
        for file in (ANSWERS, JUDGED, METRICS):
            packed = packed_name(target / "points" / name / file)
            if (run / file).is_file():
                _pack(run / file, packed)
            else:
                packed.unlink(missing_ok=True)  # of a point that has ended before
    names = sorted(points)
    kept = {"points": [points[name] for name in names]}
    write_text(target / RESULTS, json.dumps(kept, indent=1) + "\n")
    return names


def _pack(source: Path, packed: Path) -> None:
    packed.parent.mkdir(parents=True, exist_ok=True)
    with replacing(packed) as partial:
        partial.write_bytes(gzip.compress(source.read_bytes(), mtime=0))  # no date: equal lines, equal file


@app.command(help=__doc__)
def main(
    sweeps: Annotated[list[Path], typer.Argument(help="output directories of gapo-mega sweep")],
    out: Annotated[Path, typer.Option(help="folder of what is kept")] = Path("benchmarks/results/comparison"),
) -> None:
    try:
        for sweep in sweeps:
            typer.echo(f"{out / sweep.resolve().name}: {len(keep(sweep, out))} points")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    app()
