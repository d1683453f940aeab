"""How often reward models prefer what people preferred, on pairs that they did not learn from.

    python -m benchmarks.comparison.accuracy helpful=MODEL=PAIRS... --out runs/tables/rewards.md

Each argument: a name for the table, a classifier with one label, a file of HH-RLHF's pairs. Writes a table.
"""

from __future__ import annotations

from collections.abc import Sequence
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


def scored(judge: Objective, pairs: Sequence[Pair]) -> list[tuple[float, float]]:
    """What ``judge`` gives to what was chosen and to what was rejected."""
    from gapo_mega.types import Prompt

    prompts = [Prompt(0, str(pair.prompt[-1]["content"]), messages=pair.prompt) for pair in pairs]
    chosen = judge.score(prompts, [pair.chosen for pair in pairs])
    rejected = judge.score(prompts, [pair.rejected for pair in pairs])
    return list(zip(chosen, rejected, strict=True))


def row(name: str, scores: Sequence[tuple[float, float]], pairs: Sequence[Pair]) -> str:
    """A line of the table."""
    from gapo_mega.evaluation.measures import of_pairs

    lengths = [(len(pair.chosen), len(pair.rejected)) for pair in pairs]
    found = of_pairs(scores, lengths)
    share, error = found["accuracy"], found.get("standard_error", 0.0)
    longer = sum(chosen > rejected for chosen, rejected in lengths) / len(pairs)
    return f"| {name} | {len(pairs)} | {share:.3f} | {error:.3f} | {longer:.3f} |\n"


@app.command(help=__doc__)
def main(
    models: Annotated[list[str], typer.Argument(metavar="NAME=MODEL=PAIRS...", help="what to measure")],
    max_tokens: Annotated[int, typer.Option(min=1, help="longer conversations lose their beginning")] = 256,
    limit: Annotated[int | None, typer.Option(min=1, help="only the first pairs of each file")] = None,
    out: Annotated[Path, typer.Option(help="file of the table")] = Path("runs/comparison/tables/rewards.md"),
) -> None:
    from tqdm import tqdm

    from gapo_mega import objectives
    from gapo_mega.config.supervised import PreferenceData
    from gapo_mega.data.pairs import load_pairs
    from gapo_mega.evaluation.files import write_text

    try:
        text = f"| {' | '.join(COLUMNS)} |\n|{' --- |' * len(COLUMNS)}\n"
        for item in models:
            name, _, rest = item.partition("=")
            model, _, file = rest.partition("=")
            if not (name and model and file):
                raise ValueError(f"NAME=MODEL=PAIRS: found {item!r}, accepted: a name, a model and a file")
            judge = objectives.build(classifier("model", model, max_tokens))
            pairs, _ = load_pairs(PreferenceData(source=file, format="hh", heldout_fraction=0), seed=0)
            pairs = pairs[:limit]
            starts = tqdm(range(0, len(pairs), CHUNK), desc=name)
            scores = [both for start in starts for both in scored(judge, pairs[start : start + CHUNK])]
            text += row(name, scores, pairs)
        write_text(out, text)
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None
    typer.echo(text)


if __name__ == "__main__":
    app()
