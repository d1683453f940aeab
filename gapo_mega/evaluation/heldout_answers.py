"""The held-out answers of a run, kept beside its summary: who wants other statistics has every score."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo_mega.evaluation.files import write_data
from gapo_mega.evaluation.summary import SUMMARY_FILE

HELDOUT_FILE = "heldout_answers.jsonl"


def write_heldout(
    path: Path,
    names: Sequence[str],
    prompts: Sequence[str],
    responses: Sequence[Sequence[str]],
    scores: Sequence[Sequence[Sequence[float]]],
) -> None:
    """A line for every answer: prompt, and response and scores before and after training.

    Args:
        path: of the file.
        names: of the M objectives.
        prompts: [n], one for every answer; samples of a prompt stand side by side.
        responses: [n] before, and [n] after.
        scores: [M][n] before, and [M][n] after.
    """
    lines = []
    for index, prompt in enumerate(prompts):
        row: dict[str, Any] = {"prompt": prompt}
        for when, texts, numbers in zip(("before", "after"), responses, scores, strict=True):
            own = {name: float(numbers[m][index]) for m, name in enumerate(names)}
            row[when] = {"response": texts[index], "scores": own}
        lines.append(json.dumps(row, ensure_ascii=False) + "\n")
    write_data(path, "".join(lines))


def scores_by_prompt(run_dir: Path, names: Sequence[str]) -> Mapping[str, tuple[float, ...]] | None:
    """Every held-out prompt's scores after training, means over its answers; None where nobody kept them.

    Raises ``ValueError`` for a line that is not as a run writes it.
    """
    path = run_dir / HELDOUT_FILE
    if not path.is_file():
        return None
    found: dict[str, list[list[float]]] = {}
    # Not splitlines: texts may hold other characters at which that would split.
    for number, line in enumerate(path.read_text(encoding="utf-8").split("\n")[:-1], 1):
        try:
            row = json.loads(line)
            own = [float(row["after"]["scores"][name]) for name in names]
            found.setdefault(str(row["prompt"]), []).append(own)
        except (ValueError, KeyError, TypeError):
            raise ValueError(
                f"{path}: line {number}: found {line[:60]!r}, accepted: prompt, before and after, as "
                f"gapo-mega train writes them beside {SUMMARY_FILE}"
            ) from None
    return {prompt: tuple(map(float, np.mean(rows, axis=0))) for prompt, rows in found.items()}
