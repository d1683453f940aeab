"""Two halves of preference files, one for the rewards of runs and one for their judges.

    python -m benchmarks.comparison.halves helpful=FILE harmless=FILE --out runs/comparison/halves

Writes rewards/NAME.jsonl and judges/NAME.jsonl. Conversations that begin alike are in one half, in all files.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated

import typer

from gapo_mega.data.json_rows import Row, json_rows

HALVES = ("rewards", "judges")
_FIRST_ANSWER = "\n\nAssistant:"

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def half_of(transcript: str) -> str:
    """The half that a transcript belongs to: by a hash of all before the assistant's first words."""
    opening = transcript.split(_FIRST_ANSWER, 1)[0].strip()
    return HALVES[hashlib.sha256(opening.encode()).digest()[0] % 2]


def _rows(file: Path) -> Iterator[tuple[int, Row]]:
    try:
        yield from json_rows(file)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from None


def divided(file: Path) -> dict[str, list[str]]:
    """The lines of each half of ``file``.

    Raises:
        ValueError: a line that is no JSON object with a text ``chosen``.
    """
    found: dict[str, list[str]] = {half: [] for half in HALVES}
    for number, row in _rows(file):
        chosen = row.get("chosen")
        if not isinstance(chosen, str):
            raise ValueError(f"{file}, line {number}: found no text 'chosen', accepted: pairs of HH-RLHF")
        found[half_of(chosen)].append(json.dumps(row, ensure_ascii=False) + "\n")
    return found


@app.command(help=__doc__)
def main(
    files: Annotated[list[str], typer.Argument(metavar="NAME=FILE...", help="what to divide")],
    out: Annotated[Path, typer.Option(help="folder for both halves")] = Path("runs/comparison/halves"),
) -> None:
    try:
        for item in files:
            name, _, file = item.partition("=")
            if not name or not Path(file).is_file():
                raise ValueError(f"NAME=FILE: found {item!r}, accepted: a name, and a file that is there")
            for half, lines in divided(Path(file)).items():
                target = out / half / f"{name}.jsonl"
                target.parent.mkdir(parents=True, exist_ok=True)
                target.write_text("".join(lines), encoding="utf-8")
                typer.echo(f"{target}: {len(lines)} pairs")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    app()
