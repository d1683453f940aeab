"""The files of a comparison: tables for people and programs, and pictures of the fronts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from gapo_mega.evaluation.compare_tables import as_csv, markdown
from gapo_mega.evaluation.files import write_text
from gapo_mega.evaluation.front_plot import Spot, write_fronts


def write_comparison(directory: Path, found: Mapping[str, Any]) -> list[Path]:
    """Write what ``compare`` gives into ``directory``, which is there; the paths, pictures last."""
    texts = {
        "compare.md": markdown(found),
        "compare.csv": as_csv(found),
        "compare.json": json.dumps(found, indent=1, allow_nan=False) + "\n",
    }
    for name, text in texts.items():
        write_text(directory / name, text)
    names = found["objectives"]
    spots = [_spot(group, names) for group in found["groups"]]
    before = [[run["heldout"][name]["before"] for name in names] for run in found["runs"]]
    start = None if any(None in row for row in before) else np.mean(before, axis=0).tolist()
    drawn = [spot for spot in spots if np.isfinite(spot.mean).all()]
    pictures = write_fronts(directory, names, drawn, start) if drawn else []
    return [*(directory / name for name in texts), *pictures]


def _spot(group: Mapping[str, Any], names: list[str]) -> Spot:
    def numbers(key: str) -> tuple[float, ...]:
        found = [group["after"][name][key] for name in names]
        return tuple(float("nan") if number is None else number for number in found)

    note = group["label"].removeprefix(group["method"]).strip(" ()")
    note = note.removeprefix("preference=").removeprefix("weights=")
    return Spot(group["method"], numbers("mean"), numbers("standard_error"), note)
