"""Directories of trainings that have ended, without training."""

from __future__ import annotations

import json
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from gapo_mega.config import Config
from gapo_mega.config.loading import dump
from gapo_mega.evaluation.finished_run import FinishedRun, read_run
from gapo_mega.evaluation.heldout_answers import write_heldout
from gapo_mega.evaluation.summary import paired_summary, write_summary
from gapo_mega.runs.directory import begin, end
from gapo_mega.runs.start import wanted

NAMES = ("concise", "plain")
UPDATES = 20


def write_run(
    folder: Path, name: str, seed: int, shift: float, phases: Sequence[str] = (), **sections: Any
) -> FinishedRun:
    """A run directory as ``train`` leaves it, whose scores after training are moved by ``shift``.

    ``phases``: of an update, whose times the log has.
    """
    directory = folder / name
    config = Config.model_validate(
        {
            "output_dir": str(directory),
            "seed": seed,
            "steps": UPDATES,
            "model": {"path": "model"},
            "data": {"source": "package:prompts"},
            "objectives": [{"name": n, "function": f"gapo_mega.demo.rewards:{n}"} for n in NAMES],
            "rollout": {"prompts_per_step": 2, "samples_per_prompt": 4},
            **sections,
        }
    )
    return leave_run(directory, config, shift, phases)


def leave_run(directory: Path, config: Config, shift: float, phases: Sequence[str] = ()) -> FinishedRun:
    """What a training with ``config`` leaves in ``directory``."""
    name, seed = directory.name, config.seed
    directory.mkdir(parents=True, exist_ok=True)
    begin(directory, wanted(config), overwrite=False)
    dump(config, directory / "config.yaml")
    generator = np.random.default_rng(seed)
    before, noise = generator.normal(size=(2, 2, 24))
    after = (
        before
        + shift
        + 0.1 * noise
        + 0.1 * np.random.default_rng(zlib.crc32(name.encode())).normal(size=(2, 24))
    )
    write_summary(directory / "summary.json", paired_summary(before, after, NAMES, 2), 12.0)
    prompts = [f"prompt {i // 2}" for i in range(24)]
    texts = [f"answer {i}\u2028" for i in range(24)]
    write_heldout(
        directory / "heldout_answers.jsonl", NAMES, prompts, [texts, texts], [before.tolist(), after.tolist()]
    )
    times = {f"time/{phase}": 0.5 for phase in phases}
    rows = [{"step": i + 1, "kl": 0.01 * i, "response_length": 9.0, **times} for i in range(UPDATES)]
    (directory / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    end(directory, config.steps)
    return read_run(directory)
