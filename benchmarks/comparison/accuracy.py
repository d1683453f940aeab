"""How often reward models prefer what people preferred, on pairs that they did not learn from.

    python -m benchmarks.comparison.accuracy helpful=MODEL=PAIRS... --out runs/tables/rewards.md

Each argument: a name for the table, a classifier with one label, a file of HH-RLHF's pairs. Writes a table,
and beside it a JSON file of all scores, of which ``--known`` makes the table again without models.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from benchmarks.comparison.judges import classifier

if TYPE_CHECKING:
    from gapo_mega.data.pairs import Pair
    from gapo_mega.objectives import Objective

COLUMNS = ("reward model", "pairs", "accuracy", "standard error", "the longer one is preferred")
CHUNK = 20  # pairs between two moves of the progress bar

app = typer.Typer(add_completion=False, rich_markup_mode=None)


Scored = tuple[float, float, int, int]  # of a pair: scores of chosen and rejected, their characters


def scored(judge: Objective, pairs: Sequence[Pair]) -> list[Scored]:
    """What ``judge`` gives to what was chosen and to what was rejected, and how long these are."""
    from gapo_mega.types import Prompt

    prompts = [Prompt(0, str(pair.prompt[-1]["content"]), messages=pair.prompt) for pair in pairs]
    chosen = judge.score(prompts, [pair.chosen for pair in pairs])
    rejected = judge.score(prompts, [pair.rejected for pair in pairs])
    return [
        (*both, len(pair.chosen), len(pair.rejected))
        for both, pair in zip(zip(chosen, rejected, strict=True), pairs, strict=True)
    ]


def table(models: Mapping[str, Sequence[Scored]]) -> str:
    """A line for each model."""
    lines = [COLUMNS, ("---",) * len(COLUMNS), *(row(name, pairs) for name, pairs in models.items())]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def row(name: str, pairs: Sequence[Scored]) -> tuple[str, ...]:
    """The cells of a model's line."""
    from gapo_mega.evaluation.measures import of_pairs

    lengths = [(chosen, rejected) for _, _, chosen, rejected in pairs]
    found = of_pairs([(chosen, rejected) for chosen, rejected, _, _ in pairs], lengths)
    longer = sum(chosen > rejected for chosen, rejected in lengths) / len(pairs)
    shares = (found["accuracy"], found.get("standard_error", 0.0), longer)
    return (name, str(len(pairs)), *(f"{share:.3f}" for share in shares))


@app.command(help=__doc__)
def main(
    models: Annotated[
        list[str] | None, typer.Argument(metavar="NAME=MODEL=PAIRS...", help="what to measure")
    ] = None,
    known: Annotated[Path | None, typer.Option(help="scores of an earlier call, which come first")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="longer conversations lose their beginning")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first pairs of each file")] = None,
    out: Annotated[Path, typer.Option(help="file of the table")] = Path("runs/comparison/tables/rewards.md"),
) -> None:
    from gapo_mega.evaluation.files import write_data

    try:
        found = {} if known is None else read(known)
        for item in models or []:
            name, _, rest = item.partition("=")
            model, _, file = rest.partition("=")
            if not (name and model and file):
                raise ValueError(f"NAME=MODEL=PAIRS: found {item!r}, accepted: a name, a model and a file")
            found[name] = measured(name, model, file, max_tokens, limit)
        if not found:
            raise ValueError("NAME=MODEL=PAIRS: found none, accepted: some, or --known")
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    out.parent.mkdir(parents=True, exist_ok=True)
    write_data(out, table(found))
    write_data(out.with_suffix(".json"), json.dumps(found) + "\n")
    typer.echo(table(found))


def read(file: Path) -> dict[str, list[Scored]]:
    """The scores that an earlier call wrote."""
    if not file.is_file():
        raise ValueError(f"--known: file {file} not found, accepted: a file that an earlier call wrote")
    found: dict[str, list[Scored]] = json.loads(file.read_text(encoding="utf-8"))
    return found


def measured(name: str, model: str, file: str, max_tokens: int, limit: int | None) -> list[Scored]:
    """Scores of a file's pairs, with a bar."""
    from tqdm import tqdm

    from gapo_mega import objectives
    from gapo_mega.config.supervised import PreferenceData
    from gapo_mega.data.pairs import load_pairs

    judge = objectives.build(classifier("model", model, max_tokens))
    pairs, _ = load_pairs(PreferenceData(source=file, format="hh", heldout_fraction=0), seed=0)
    pairs = pairs[:limit]
    starts = tqdm(range(0, len(pairs), CHUNK), desc=name)
    return [found for start in starts for found in scored(judge, pairs[start : start + CHUNK])]


if __name__ == "__main__":
    app()
