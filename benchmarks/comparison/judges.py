"""Scores of runs' held-out answers by reward models that no run was trained on.

    python -m benchmarks.comparison.judges SWEEP... --judge helpful=MODEL --judge harmless=MODEL

Writes judged_answers.jsonl beside heldout_answers.jsonl of every ended run; files that are there stay.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from benchmarks.comparison.gains import ANSWERS, JUDGED, ended_runs, is_there, rows_of

if TYPE_CHECKING:
    from gapo_mega.config import ObjectiveConfig
    from gapo_mega.objectives import Objective
    from gapo_mega.types import Prompt

app = typer.Typer(add_completion=False, rich_markup_mode=None)


def heldout_prompts(run: Path) -> list[Prompt]:
    """The prompts of a run's held-out answers, in their order, one an answer."""
    from gapo_mega.config.loading import load
    from gapo_mega.data.prompts import load_prompts
    from gapo_mega.models.huggingface.location import companions_of
    from gapo_mega.models.huggingface.tokenizer import read_tokenizer

    config = load(run / "config.yaml", [])
    tokenizer = read_tokenizer(companions_of(Path(config.model.path)), "model.path")
    _, heldout = load_prompts(config.data, tokenizer, config.seed, config.columns)
    return [prompt for prompt in heldout for _ in range(config.evaluation.samples_per_prompt)]


def judged(
    rows: Sequence[Mapping[str, Any]], prompts: Sequence[Prompt], judges: Sequence[Objective]
) -> list[dict[str, Any]]:
    """``rows`` of held-out answers with the scores of ``judges`` in place of the run's own.

    Raises ``ValueError`` where the answers are to other prompts.
    """
    if len(rows) != len(prompts) or any(
        row["prompt"] != prompt.text for row, prompt in zip(rows, prompts, strict=True)
    ):
        raise ValueError(f"{ANSWERS}: found answers to other prompts than the run's configuration gives")
    found = [{"prompt": row["prompt"]} for row in rows]
    for when in ("before", "after"):
        texts = [row[when]["response"] for row in rows]
        scores = {judge.name: judge.score(prompts, texts) for judge in judges}
        for index, (row, text) in enumerate(zip(found, texts, strict=True)):
            own = {name: numbers[index] for name, numbers in scores.items()}
            row[when] = {"response": text, "scores": own}
    return found


def classifier(name: str, model: str, max_tokens: int) -> ObjectiveConfig:
    """The objective that is a reward model on disk."""
    from gapo_mega.config import ObjectiveConfig

    options = {"model": model, "max_tokens": max_tokens}
    return ObjectiveConfig(name=name, kind="hf_classifier", options=options)


@app.command(help=__doc__)
def main(
    sweeps: Annotated[list[Path], typer.Argument(help="output directories of gapo-mega sweep")],
    judge: Annotated[list[str], typer.Option(metavar="NAME=MODEL", help="a classifier with one label")],
    max_tokens: Annotated[int, typer.Option(min=1, help="longer conversations lose their beginning")] = 256,
) -> None:
    from tqdm import tqdm

    from gapo_mega import objectives
    from gapo_mega.evaluation.files import write_text

    try:
        pairs = [text.partition("=")[::2] for text in judge]
        judges = objectives.build_all([classifier(name, model, max_tokens) for name, model in pairs])
        runs = [run for _, _, run in ended_runs(sweeps)]
        for run in tqdm([run for run in runs if not is_there(run / JUDGED)], desc="runs"):
            lines = judged(rows_of(run / ANSWERS), heldout_prompts(run), judges)
            write_text(run / JUDGED, "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
    except ValueError as error:
        raise SystemExit(f"error: {error}") from None


if __name__ == "__main__":
    app()
