"""Runs as loggers see them: a directory with everything that a report shows, and its steps."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure

from gapo_mega.config import LoggingConfig
from gapo_mega.runs.log import RunLog
from tests.helpers.finished_runs import write_run

PICTURES = ("kl", "rewards")
LAST = 4


def finished(folder: Path, name: str = "run") -> Path:
    """The directory of a run that has ended, with a report."""
    directory = write_run(folder, name, seed=1, shift=0.5).directory
    report = directory / "report"
    report.mkdir()
    for picture in PICTURES:
        figure = Figure(figsize=(1, 1))
        figure.subplots().imshow(np.arange(4.0).reshape(2, 2))
        figure.savefig(report / f"{picture}.png")
    (report / "index.html").write_text("<!doctype html><title>run</title><p>The report.</p>")
    return directory


def metrics_of(step: int) -> dict[str, float]:
    """Of step ``step``; two of them have a number that is not known."""
    return {"reward/concise": 0.5 * step, "kl": math.nan if step % 2 else 0.25 * step}


def log_all(directory: Path, *loggers: dict[str, Any], resume_at: int | None = None) -> None:
    """The whole life of a run; with ``resume_at`` one process is killed after that step, another goes on."""
    config = LoggingConfig.model_validate({"tensorboard": False, "progress": False, "loggers": list(loggers)})
    first = 1
    if resume_at is not None:
        killed = RunLog(directory, ["concise"], config, LAST)
        killed.truncate_after(0)
        for step in range(1, resume_at + 1):
            killed.write(step, metrics_of(step))
        killed.close(failed=True)
        first = resume_at + 1
    with RunLog(directory, ["concise"], config, LAST) as log:
        log.truncate_after(first - 1)
        for step in range(first, LAST + 1):
            log.write(step, metrics_of(step))
        log.end_steps()
        log.conclude()
